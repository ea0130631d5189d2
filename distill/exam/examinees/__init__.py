"""Who can be examined: students of ours, transformers folders, GGUFs, models of Ollama."""
