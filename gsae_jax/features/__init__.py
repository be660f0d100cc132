"""What is known of every feature of an SAE: collected in one pass over text, and read from a file."""
