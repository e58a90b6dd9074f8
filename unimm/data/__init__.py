"""Datasets: EmojiScenes (artwork, scenes, captions, questions) and the text tokenizer trained on it."""
