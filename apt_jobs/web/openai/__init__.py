"""The `/v1` dialect: what the official `openai` package sends and expects, over our jobs."""
