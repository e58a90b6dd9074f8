"""The words of synthetic tables: heads of columns, and by topic what stands in them.

All are plain lower-case letters; a table may write them with a capital.
"""

from __future__ import annotations

WORD_HEADS = (
    "name", "item", "city", "team", "color", "group", "owner", "brand", "class", "type", "kind", "state", "place",
    "label", "crop", "unit", "street", "region", "author", "driver", "material", "supplier", "category", "country",
)  # fmt: skip
"""Heads of columns of words."""
NUMBER_HEADS = (
    "price", "year", "size", "total", "count", "score", "age", "cost", "rate", "stock", "sales", "hours", "goals",
    "share", "speed", "width", "depth", "votes", "pages", "seats", "weight", "height", "length", "points", "orders",
    "growth", "profit", "income", "volume", "visitors",
)  # fmt: skip
"""Heads of columns of numbers."""
TOPICS: dict[str, tuple[str, ...]] = {
    "food": (
        "apple", "pear", "plum", "lemon", "grape", "melon", "peach", "mango", "corn", "bean", "onion", "rice", "bread",
        "milk", "cheese", "butter", "honey", "sugar", "salt", "pepper", "carrot", "potato", "tomato", "banana",
        "cherry", "olive", "walnut", "garlic", "spinach", "pumpkin", "apricot", "cucumber",
    ),
    "animals": (
        "cat", "dog", "horse", "sheep", "goat", "cow", "pig", "hen", "duck", "goose", "bear", "wolf", "fox", "deer",
        "hare", "mouse", "whale", "shark", "eagle", "owl", "crow", "swan", "tiger", "lion", "zebra", "camel", "rabbit",
        "beaver", "spider", "turtle", "giraffe", "elephant",
    ),
    "places": (
        "paris", "rome", "oslo", "lima", "cairo", "delhi", "tokyo", "bern", "kiev", "quito", "accra", "hanoi", "seoul",
        "milan", "turin", "porto", "lyon", "graz", "perth", "dover", "london", "madrid", "vienna", "dublin", "lisbon",
        "prague", "athens", "warsaw", "nairobi", "toronto", "chicago", "montreal",
    ),
    "things": (
        "chair", "table", "lamp", "shelf", "door", "clock", "spoon", "fork", "knife", "cup", "plate", "bowl", "bag",
        "belt", "shoe", "sock", "coat", "shirt", "ring", "rope", "nail", "screw", "saw", "drill", "hammer", "mirror",
        "pencil", "basket", "bottle", "carpet", "curtain", "keyboard",
    ),
    "colors": (
        "red", "blue", "green", "black", "white", "brown", "pink", "grey", "gold", "amber", "ivory", "beige", "coral",
        "teal", "navy", "olive", "purple", "orange", "yellow", "silver", "violet", "maroon", "crimson", "turquoise",
    ),
    "nature": (
        "oak", "pine", "birch", "maple", "rose", "tulip", "lily", "fern", "moss", "river", "lake", "hill", "stone",
        "sand", "cloud", "rain", "snow", "wind", "storm", "frost", "desert", "forest", "meadow", "valley", "island",
        "canyon", "glacier", "mountain",
    ),
    "times": (
        "monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday", "january", "february", "march",
        "april", "may", "june", "july", "august", "september", "october", "november", "december", "spring", "summer",
        "autumn", "winter", "noon", "night",
    ),
    "work": (
        "baker", "nurse", "pilot", "clerk", "judge", "miner", "tailor", "waiter", "doctor", "farmer", "lawyer",
        "dancer", "writer", "singer", "painter", "plumber", "teacher", "engineer", "steel", "wool", "silk", "cotton",
        "glass", "paper", "cement", "copper", "rubber", "leather",
    ),
}  # fmt: skip
"""Topic -> words; the words of a column are of one topic."""


def words_by_topic(length: tuple[int, int], most: int | None = None) -> dict[str, tuple[str, ...]]:
    """Return the words of each topic that may be used.

    Args:
        length: letters of the shortest and of the longest.
        most: words of a topic, the first ones; None: all.
    """
    found = {
        topic: tuple(word for word in words if length[0] <= len(word) <= length[1])[:most]
        for topic, words in TOPICS.items()
    }
    return {topic: words for topic, words in found.items() if words}


def column_heads(length: tuple[int, int], numbers: bool) -> tuple[str, ...]:
    """Return the heads of columns of words, or of numbers, no longer than the longest word."""
    heads = NUMBER_HEADS if numbers else WORD_HEADS
    return tuple(head for head in heads if len(head) <= length[1])
