"""Students for other programs: a server that speaks Ollama's API and OpenAI's."""
