"""The page: from a folder of pictures to a task in production, in a browser."""
