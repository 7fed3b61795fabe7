"""The compile command: turns a folder of images and caption files into a metadata.jsonl."""
