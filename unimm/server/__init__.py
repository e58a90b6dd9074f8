"""`unimm serve`: OpenAI's routes for asking and drawing, over one engine that all requests share."""
