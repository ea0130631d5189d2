"""Stopwatches: what each part takes, beside another way of doing it where there is one."""
