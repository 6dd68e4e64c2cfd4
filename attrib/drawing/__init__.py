"""Pictures of maps, words and sounds."""
