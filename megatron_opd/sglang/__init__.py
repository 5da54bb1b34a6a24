"""SGLang servers: the client, who gets which request, starting servers, and giving them weights."""
