"""The commands that the runtime itself brings."""
