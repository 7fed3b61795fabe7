"""What makes the captions: the model in this process, a server, a Ray cluster."""
