"""Generation: find and load models, batch requests, sample text. Imported by the generation worker alone."""
