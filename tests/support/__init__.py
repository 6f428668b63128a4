"""What the tests share. Every helper is imported from here, under one name, so that what it caches is cached once."""
