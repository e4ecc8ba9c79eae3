"""A pipeline behind OpenAI's images API: fields in, a queue, pictures out."""
