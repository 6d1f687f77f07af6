"""A really running evicting server under requests that nobody meant: what stock vLLM survives, it survives (make bench NAME=fuzz)."""
