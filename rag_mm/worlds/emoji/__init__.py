"""The emoji world: pictures with names, and scenes whose facts are known exactly."""
