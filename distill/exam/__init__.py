"""One system on prompts: what is asked, who answers, and how it is measured."""
