"""The Python client of the REST and WebSocket interfaces."""
