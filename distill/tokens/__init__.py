"""How it is written down: a vocabulary of BPE and image tokens, the chat format, training documents."""
