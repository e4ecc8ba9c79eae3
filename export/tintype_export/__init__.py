"""Export: graphs, engines and their verification."""
