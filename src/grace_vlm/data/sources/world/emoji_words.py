"""What emoji are called in questions: plain names, what sort of thing each is, and words with their articles.

``emoji.json`` has Unicode's names, made for programs ("ELECTRIC LIGHT BULB", "WHITE MEDIUM STAR"), and sub-categories.
"""

from __future__ import annotations

import re

GROUPS: dict[str, tuple[str, float]] = {
    # sort of thing: (plural, how often one is drawn, relative to the others)
    "animal": ("animals", 22.0),
    "plant": ("plants", 5.0),
    "food": ("kinds of food", 17.0),
    "drink": ("drinks", 3.0),
    "vehicle": ("vehicles", 9.0),
    "building": ("buildings", 5.0),
    "piece of clothing": ("pieces of clothing", 6.0),
    "musical instrument": ("musical instruments", 3.0),
    "tool": ("tools", 4.0),
    "household item": ("household items", 4.0),
    "electronic device": ("electronic devices", 4.0),
    "thing for the office": ("things for the office", 4.0),
    "thing for sport or play": ("things for sport or play", 7.0),
    "face": ("faces", 9.0),
    "person": ("people", 7.0),
    "body part": ("body parts", 2.0),
    "thing in the sky": ("things in the sky", 5.0),
    "heart": ("hearts", 2.0),
    "clock": ("clocks", 1.0),
    "other": ("other things", 4.0),
}

SUBCATEGORIES: dict[str, tuple[str, str | None]] = {
    # of emoji.json: (sort of thing, the finer sort, where there is one)
    "animal-bird": ("animal", "bird"),
    "animal-bug": ("animal", "bug"),
    "animal-mammal": ("animal", "mammal"),
    "animal-marine": ("animal", "sea animal"),
    "animal-reptile": ("animal", "reptile"),
    "animal-amphibian": ("animal", "amphibian"),
    "plant-flower": ("plant", "flower"),
    "plant-other": ("plant", None),
    "food-asian": ("food", "Asian dish"),
    "food-fruit": ("food", "fruit"),
    "food-prepared": ("food", None),
    "food-sweet": ("food", "sweet"),
    "food-vegetable": ("food", "vegetable"),
    "drink": ("drink", None),
    "dishware": ("household item", None),
    "household": ("household item", None),
    "lock": ("household item", None),
    "transport-ground": ("vehicle", "land vehicle"),
    "transport-air": ("vehicle", "aircraft"),
    "transport-water": ("vehicle", "boat"),
    "place-building": ("building", None),
    "place-religious": ("building", "place of worship"),
    "clothing": ("piece of clothing", None),
    "musical-instrument": ("musical instrument", None),
    "tool": ("tool", None),
    "computer": ("electronic device", None),
    "light & video": ("electronic device", None),
    "phone": ("electronic device", None),
    "book-paper": ("thing for the office", None),
    "office": ("thing for the office", None),
    "writing": ("thing for the office", None),
    "mail": ("thing for the office", None),
    "sport": ("thing for sport or play", "sport"),
    "game": ("thing for sport or play", "game"),
    "cat-face": ("face", "cat's face"),
    "monkey-face": ("face", "monkey's face"),
    "person": ("person", None),
    "person-activity": ("person", None),
    "person-fantasy": ("person", "figure of fantasy"),
    "person-role": ("person", None),
    "person-sport": ("person", "sportsperson"),
    "body-parts": ("body part", None),
    "hand-fingers-closed": ("body part", "hand"),
    "hand-fingers-open": ("body part", "hand"),
    "hand-fingers-partial": ("body part", "hand"),
    "hand-single-finger": ("body part", "hand"),
    "hands": ("body part", "hand"),
    "sky & weather": ("thing in the sky", None),
    "heart": ("heart", None),
    "time": ("clock", None),
    **dict.fromkeys(
        ("arts & crafts", "award-medal", "event", "medical", "money", "music", "science", "sound", "hotel", "zodiac",
         "place-geographic", "place-map", "place-other", "geometric", "emotion", "other-object", "religion"),
        ("other", None),
    ),
    **dict.fromkeys(
        ("face-affection", "face-concerned", "face-costume", "face-glasses", "face-hand", "face-hat", "face-negative",
         "face-neutral-skeptical", "face-sleepy", "face-smiling", "face-tongue", "face-unwell"),
        ("face", "smiley"),
    ),
}  # fmt: skip
"""Flags have a source of their own; signs and letters are left out."""

LEFT_OUT = frozenset(
    (
        "adult", "airplane_arriving", "airplane_departure", "anchor", "anger", "bath", "black_square_button",
        "blossom", "bricks", "building_construction", "busstop", "bust_in_silhouette", "busts_in_silhouette",
        "candle", "chart", "child", "closed_umbrella", "construction", "coral", "dancers", "dash",
        "diamond_shape_with_a_dot_inside", "diya_lamp", "droplet", "empty_nest", "european_post_office",
        "eye-in-speech-bubble", "feather", "feet", "film_frames", "first_quarter_moon_with_face", "flags",
        "fuelpump", "hole", "house_buildings", "izakaya_lantern", "last_quarter_moon_with_face",
        "left_speech_bubble", "light_rail", "lock_with_ink_pen", "love_hotel", "low_battery", "mag",
        "mag_right", "mailbox", "mailbox_with_mail", "mailbox_with_no_mail", "massage", "metro", "microbe",
        "middle_finger", "minidisc", "monorail", "motor_boat", "motorway", "nest_with_eggs",
        "new_moon_with_face", "no_good", "octagonal_sign", "oil_drum", "ok_woman", "older_adult", "om_symbol",
        "oncoming_automobile", "oncoming_bus", "oncoming_police_car", "oncoming_taxi", "ophiuchus",
        "person_with_veil", "pig_nose", "post_office", "radio_button", "railway_track", "right_anger_bubble",
        "ring_buoy", "rock", "rosette", "rotating_light", "seat", "shell", "ship", "six_pointed_star",
        "skin-tone-2", "skin-tone-3", "sleeping_accommodation", "snowman_without_snow", "speech_balloon",
        "spider_web", "standing_person", "star2", "station", "sweat_drops", "thermometer", "thought_balloon",
        "trackball", "traffic_light", "train", "umbrella", "umbrella_on_ground", "umbrella_with_rain_drops",
        "unlock", "vertical_traffic_light", "waning_crescent_moon", "waning_gibbous_moon",
        "waxing_crescent_moon", "wedding", "wheel", "white_flower", "white_square_button", "wing", "wood",
        "zap", "zzz",
    )
)  # fmt: skip

RENAMED: dict[str, str] = {
    # by the first short name
    "art": "paint palette", "frame_with_picture": "framed picture", "gift": "present", "tada": "party popper",
    "mahjong": "mahjong tile", "black_joker": "joker card", "dart": "dartboard", "8ball": "billiard ball",
    "gun": "water pistol", "jigsaw": "puzzle piece", "spades": "spade", "clubs": "club", "hearts": "heart suit",
    "diamonds": "diamond suit", "fishing_pole_and_fish": "fishing rod", "tennis": "tennis racket",
    "basketball": "basketball", "cricket_bat_and_ball": "cricket bat", "golf": "golf flag",
    "field_hockey_stick_and_ball": "hockey stick", "ice_hockey_stick_and_puck": "ice hockey stick",
    "table_tennis_paddle_and_ball": "table tennis paddle", "badminton_racquet_and_shuttlecock": "badminton racket",
    "lacrosse": "lacrosse stick", "ski": "skis", "running_shirt_with_sash": "running shirt",
    "womans_hat": "sun hat", "womans_clothes": "blouse", "mans_shoe": "dress shoe", "sandal": "sandal",
    "boot": "boots", "helmet_with_white_cross": "rescue helmet", "thong_sandal": "flip-flop", "gem": "gem",
    "computer": "laptop", "cd": "compact disc", "keyboard": "keyboard", "couch_and_lamp": "couch",
    "shopping_trolley": "shopping cart", "bulb": "light bulb", "clapper": "clapperboard", "vhs": "video cassette",
    "flashlight": "flashlight", "closed_lock_with_key": "lock and key", "lock": "padlock",
    "e-mail": "e-mail", "mailbox_closed": "mailbox", "envelope_with_arrow": "envelope with arrow",
    "ballot_box_with_ballot": "ballot box", "yen": "yen banknote", "dollar": "dollar banknote",
    "euro": "euro banknote", "pound": "pound banknote", "headphones": "headphones", "notes": "musical notes",
    "drum_with_drumsticks": "drum", "scissors": "scissors", "date": "calendar", "calendar": "tear-off calendar",
    "iphone": "mobile phone", "calling": "phone with arrow", "phone": "telephone", "dna": "DNA",
    "loudspeaker": "loudspeaker", "mega": "megaphone", "mute": "muted speaker", "sound": "quiet speaker",
    "loud_sound": "loud speaker", "no_bell": "crossed-out bell", "compression": "clamp", "link": "chain link",
    "lips": "mouth", "muscle": "flexed arm", "facepunch": "fist", "+1": "thumbs up", "-1": "thumbs down",
    "hand": "raised hand", "raised_hand_with_fingers_splayed": "spread hand", "spock-hand": "vulcan salute",
    "the_horns": "sign of the horns", "crossed_fingers": "crossed fingers", "v": "victory sign",
    "hand_with_index_finger_and_thumb_crossed": "finger heart", "point_up_2": "hand pointing up",
    "point_down": "hand pointing down", "point_left": "hand pointing left", "point_right": "hand pointing right",
    "index_pointing_at_the_viewer": "hand pointing at you", "point_up": "raised finger", "clap": "clapping hands",
    "raised_hands": "raised hands", "pray": "folded hands", "open_hands": "open hands", "wave": "waving hand",
    "ok_hand": "OK sign", "i_love_you_hand_sign": "love-you sign", "santa": "Santa Claus",
    "mrs_claus": "Mrs. Claus", "man_in_business_suit_levitating": "man in a suit", "sleuth_or_spy": "detective",
    "person_in_tuxedo": "person in a tuxedo", "man_with_gua_pi_mao": "man with a cap", "house": "house",
    "rice_scene": "moon viewing", "shinto_shrine": "shrine", "earth_africa": "globe with Africa",
    "earth_americas": "globe with the Americas", "earth_asia": "globe with Asia", "ocean": "wave",
    "japan": "map of Japan", "city_sunset": "city at dusk", "city_sunrise": "sunset over buildings",
    "night_with_stars": "night with stars", "sunny": "sun", "star": "star", "moon": "gibbous moon",
    "first_quarter_moon": "half moon", "mostly_sunny": "sun behind a small cloud", "partly_sunny": "sun behind a cloud",
    "barely_sunny": "sun behind a large cloud", "partly_sunny_rain": "sun behind a rain cloud",
    "rain_cloud": "rain cloud", "snow_cloud": "snow cloud", "lightning": "lightning cloud",
    "thunder_cloud_and_rain": "thunderstorm", "wind_blowing_face": "wind", "bullettrain_side": "high-speed train",
    "bullettrain_front": "bullet train", "car": "car", "blue_car": "camper van", "truck": "delivery truck",
    "articulated_lorry": "truck", "bike": "bicycle", "racing_motorcycle": "motorcycle", "boat": "sailboat",
    "relaxed": "smiling face", "skull": "skull", "hankey": "pile of poo", "alien": "alien", "space_invader": "alien "
    "monster", "ladybug": "ladybug", "whale": "spouting whale", "hatched_chick": "front-facing chick",
    "leaves": "leaves in the wind", "ear_of_rice": "ear of rice", "corn": "corn", "eggplant": "eggplant",
    "apple": "red apple", "pizza": "pizza", "stew": "pot of stew", "fried_egg": "fried egg", "fries": "french fries",
    "hocho": "kitchen knife", "knife_fork_plate": "plate with fork and knife", "tea": "cup of tea",
    "coffee": "cup of coffee", "sake": "sake", "champagne": "champagne", "beers": "two beer mugs", "ramen": "bowl of "
    "noodles", "rice": "bowl of rice", "curry": "curry", "sweet_potato": "sweet potato", "fish_cake": "fish cake",
    "cake": "piece of cake", "icecream": "soft ice cream", "birthday": "birthday cake", "mate_drink": "mate",
    "shallow_pan_of_food": "pan of food", "bee": "bee", "bomb": "bomb", "love_letter": "love letter",
    "heart": "red heart", "heartpulse": "growing heart", "cupid": "heart with arrow", "white_large_square":
    "white square", "black_large_square": "black square",
}  # fmt: skip

_PLURALS = frozenset(
    (
        "arts", "bags", "beads", "beans", "blueberries", "books", "boots", "briefs", "bubbles", "chains",
        "cherries", "chopsticks", "dolls", "drumsticks", "eyeglasses", "eyes", "fireworks", "footprints",
        "fries", "glasses", "gloves", "goggles", "grapes", "hands", "headphones", "hearts", "jeans", "leaves",
        "lungs", "maracas", "masks", "mugs", "noodles", "notes", "pancakes", "paperclips", "peanuts", "peas",
        "scissors", "shoes", "shorts", "skis", "socks", "sparkles", "springs", "stairs", "stars", "sunglasses",
        "swords", "tickets", "tracks", "wrestlers",
    )
)  # fmt: skip
_MASS = frozenset(
    (
        "DNA", "bacon", "billiards", "bowling", "bread", "broccoli", "butter", "champagne", "coffee", "coral",
        "corn", "curry", "custard", "dango", "falafel", "fire", "fog", "garlic", "ginger", "golf", "handball",
        "juggling", "lightning", "luggage", "mail", "mate", "milk", "money", "oden", "poo", "popcorn", "ramen",
        "rice", "sake", "salt", "soap", "spaghetti", "sushi", "tea", "thread", "wind", "yarn",
    )
)  # fmt: skip


def one(name: str) -> str:
    """With its article, where it takes one: ``a dog``, ``an owl``, ``grapes``, ``bread``."""
    head = re.split(r" (?:with|of|in|on|behind) ", name)[0].split()[-1]
    if head in _PLURALS or head in _MASS or head == "o'clock" or name[0].isupper():
        return name
    return f"{'an' if name[0] in 'aeiou' and not name.startswith(('uni', 'eu', 'one')) else 'a'} {name}"


def many(name: str) -> str:
    """The plural of a name for counting: ``dogs``, ``cherries``; ``pictures of bread`` where there is none."""
    head, _, tail = name.partition(" of ")
    if tail:
        return f"{many(head)} of {tail}"
    last = name.split()[-1]
    if last in _MASS or last in _PLURALS or " with " in name or " in " in name or name[0].isupper():
        return f"pictures of {name}"
    if name.endswith(("s", "x", "ch", "sh")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    for word, plural in (("mouse", "mice"), ("goose", "geese"), ("tooth", "teeth"), ("foot", "feet")):
        if last == word:
            return name[: -len(word)] + plural
    if last in ("fish", "sheep", "deer", "squid", "shrimp", "ox", "bison"):
        return {"ox": "oxen"}.get(name, name)
    if last in ("leaf", "wolf", "knife", "scarf", "elf"):
        return name.removesuffix("fe").removesuffix("f") + "ves"
    return name + "s"
