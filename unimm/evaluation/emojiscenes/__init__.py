"""What a model knows and draws of EmojiScenes, measured."""
