"""The emoji world: named emoji art, and scenes with exact facts."""
