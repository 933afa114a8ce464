"""A trained model as a directory or a repository of the Hub."""
