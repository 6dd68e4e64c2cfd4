"""What methods are made of. No module here defines a method."""
