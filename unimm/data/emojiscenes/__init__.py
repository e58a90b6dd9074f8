"""EmojiScenes: real artwork with names, composed into scenes with captions and questions."""
