"""What a person sees on the terminal: messages, progress, meters."""
