"""Packages: a trained student as transformers, llama.cpp, Ollama and we load it."""
