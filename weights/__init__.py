"""Where models come from: names, downloads, GGUF. Each fetched model lies in a directory of its own beside these files."""
