"""What any process of attrib needs: signals, memory, exit statuses."""
