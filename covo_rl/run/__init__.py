"""A whole run, its report page, and what is checked before it."""
