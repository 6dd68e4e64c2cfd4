"""What several methods are made of; no method of its own."""
