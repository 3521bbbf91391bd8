"""A web page, an OpenAI-compatible server and figures for trained adapters."""
