"""From a YAML configuration to the objects of an experiment."""
