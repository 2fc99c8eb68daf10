"""What a cache is made of: parts, where they lie, and what is done to them."""
