"""Models of other libraries as packed towers, and back."""
