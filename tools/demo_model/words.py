"""Facts about animals, colours and words that the demo model learns, and the word lists of the generators."""


def _listed(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


# animal, what it does (sound), its young, its class, legs, where it lives; an empty string is "not asked"
ANIMALS: tuple[tuple[str, str, str, str, int, str], ...] = (
    ("dog", "barks", "puppy", "mammal", 4, "in a kennel"),
    ("cat", "meows", "kitten", "mammal", 4, "in a house"),
    ("cow", "moos", "calf", "mammal", 4, "in a barn"),
    ("horse", "neighs", "foal", "mammal", 4, "in a stable"),
    ("sheep", "bleats", "lamb", "mammal", 4, "in a meadow"),
    ("goat", "bleats", "kid", "mammal", 4, "in the mountains"),
    ("pig", "oinks", "piglet", "mammal", 4, "in a sty"),
    ("lion", "roars", "cub", "mammal", 4, "in the savanna"),
    ("tiger", "roars", "cub", "mammal", 4, "in the jungle"),
    ("bear", "growls", "cub", "mammal", 4, "in a cave"),
    ("wolf", "howls", "pup", "mammal", 4, "in a den"),
    ("fox", "yelps", "kit", "mammal", 4, "in a burrow"),
    ("elephant", "trumpets", "calf", "mammal", 4, "in the savanna"),
    ("mouse", "squeaks", "pinkie", "mammal", 4, "in a hole"),
    ("donkey", "brays", "foal", "mammal", 4, "in a stable"),
    ("monkey", "chatters", "infant", "mammal", 4, "in the jungle"),
    ("camel", "", "calf", "mammal", 4, "in the desert"),
    ("kangaroo", "", "joey", "mammal", 4, "in Australia"),
    ("rabbit", "", "bunny", "mammal", 4, "in a burrow"),
    ("deer", "", "fawn", "mammal", 4, "in the forest"),
    ("whale", "sings", "calf", "mammal", 0, "in the ocean"),
    ("dolphin", "whistles", "calf", "mammal", 0, "in the ocean"),
    ("hedgehog", "", "hoglet", "mammal", 4, "in a hedge"),
    ("squirrel", "", "", "mammal", 4, "in a tree"),
    ("beaver", "", "", "mammal", 4, "in a lodge"),
    ("duck", "quacks", "duckling", "bird", 2, "on a pond"),
    ("goose", "honks", "gosling", "bird", 2, "on a lake"),
    ("hen", "clucks", "chick", "bird", 2, "in a coop"),
    ("rooster", "crows", "", "bird", 2, "in a coop"),
    ("owl", "hoots", "owlet", "bird", 2, "in a hollow tree"),
    ("pigeon", "coos", "squab", "bird", 2, "in a loft"),
    ("crow", "caws", "", "bird", 2, "in the treetops"),
    ("swan", "", "cygnet", "bird", 2, "on a river"),
    ("eagle", "screeches", "eaglet", "bird", 2, "in the mountains"),
    ("penguin", "", "chick", "bird", 2, "in Antarctica"),
    ("turkey", "gobbles", "poult", "bird", 2, "on a farm"),
    ("frog", "croaks", "tadpole", "amphibian", 4, "by a pond"),
    ("toad", "", "", "amphibian", 4, "under a stone"),
    ("salamander", "", "", "amphibian", 4, "in a stream"),
    ("snake", "hisses", "snakelet", "reptile", 0, "in the grass"),
    ("lizard", "", "", "reptile", 4, "on a wall"),
    ("crocodile", "", "hatchling", "reptile", 4, "in a swamp"),
    ("turtle", "", "", "reptile", 4, "in the sea"),
    ("salmon", "", "fry", "fish", 0, "in a river"),
    ("shark", "", "", "fish", 0, "in the ocean"),
    ("trout", "", "", "fish", 0, "in a stream"),
    ("bee", "buzzes", "", "insect", 6, "in a hive"),
    ("ant", "", "", "insect", 6, "in an anthill"),
    ("butterfly", "", "caterpillar", "insect", 6, "in a garden"),
    ("cricket", "chirps", "", "insect", 6, "in the grass"),
    ("spider", "", "spiderling", "arachnid", 8, "in a web"),
    ("scorpion", "", "", "arachnid", 8, "in the desert"),
)

# two colours and what they make
MIXES: tuple[tuple[str, str, str], ...] = (
    ("red", "blue", "purple"),
    ("red", "yellow", "orange"),
    ("blue", "yellow", "green"),
    ("red", "white", "pink"),
    ("black", "white", "grey"),
    ("blue", "white", "light blue"),
    ("green", "white", "light green"),
    ("red", "green", "brown"),
    ("blue", "green", "turquoise"),
    ("red", "black", "maroon"),
    ("blue", "black", "navy"),
    ("brown", "white", "beige"),
)

# thing as a subject with its verb, colour
COLOURS: tuple[tuple[str, str, str], ...] = (
    ("grass", "is", "green"),
    ("snow", "is", "white"),
    ("milk", "is", "white"),
    ("coal", "is", "black"),
    ("blood", "is", "red"),
    ("the sun", "is", "yellow"),
    ("the clear sky", "is", "blue"),
    ("a banana", "is", "yellow"),
    ("a lemon", "is", "yellow"),
    ("a ripe tomato", "is", "red"),
    ("a strawberry", "is", "red"),
    ("a carrot", "is", "orange"),
    ("a pumpkin", "is", "orange"),
    ("a cucumber", "is", "green"),
    ("a frog", "is", "green"),
    ("a flamingo", "is", "pink"),
    ("an elephant", "is", "grey"),
    ("a raven", "is", "black"),
    ("a polar bear", "is", "white"),
    ("a plum", "is", "purple"),
    ("an aubergine", "is", "purple"),
    ("chocolate", "is", "brown"),
    ("coffee", "is", "brown"),
    ("a ruby", "is", "red"),
    ("an emerald", "is", "green"),
    ("a sapphire", "is", "blue"),
    ("gold", "is", "yellow"),
    ("salt", "is", "white"),
    ("a fire engine", "is", "red"),
    ("a blueberry", "is", "blue"),
)

OPPOSITES: tuple[tuple[str, str], ...] = (
    ("hot", "cold"),
    ("big", "small"),
    ("up", "down"),
    ("left", "right"),
    ("open", "closed"),
    ("day", "night"),
    ("happy", "sad"),
    ("fast", "slow"),
    ("young", "old"),
    ("light", "dark"),
    ("wet", "dry"),
    ("full", "empty"),
    ("hard", "soft"),
    ("loud", "quiet"),
    ("rich", "poor"),
    ("early", "late"),
    ("easy", "difficult"),
    ("clean", "dirty"),
    ("long", "short"),
    ("near", "far"),
    ("high", "low"),
    ("strong", "weak"),
    ("thick", "thin"),
    ("true", "false"),
    ("first", "last"),
    ("inside", "outside"),
    ("above", "below"),
    ("always", "never"),
    ("love", "hate"),
    ("begin", "end"),
    ("win", "lose"),
    ("buy", "sell"),
    ("give", "take"),
    ("push", "pull"),
    ("sweet", "bitter"),
    ("brave", "afraid"),
    ("wide", "narrow"),
    ("deep", "shallow"),
    ("heavy", "light"),
    ("cheap", "expensive"),
    ("safe", "dangerous"),
    ("same", "different"),
    ("smooth", "rough"),
    ("tall", "short"),
    ("asleep", "awake"),
)

PLURALS: tuple[tuple[str, str], ...] = (
    ("mouse", "mice"),
    ("goose", "geese"),
    ("foot", "feet"),
    ("tooth", "teeth"),
    ("child", "children"),
    ("man", "men"),
    ("woman", "women"),
    ("person", "people"),
    ("ox", "oxen"),
    ("leaf", "leaves"),
    ("wolf", "wolves"),
    ("knife", "knives"),
    ("wife", "wives"),
    ("loaf", "loaves"),
    ("shelf", "shelves"),
    ("city", "cities"),
    ("baby", "babies"),
    ("story", "stories"),
    ("berry", "berries"),
    ("box", "boxes"),
    ("fox", "foxes"),
    ("bus", "buses"),
    ("dish", "dishes"),
    ("match", "matches"),
    ("potato", "potatoes"),
    ("hero", "heroes"),
    ("cat", "cats"),
    ("dog", "dogs"),
    ("tree", "trees"),
    ("book", "books"),
    ("apple", "apples"),
    ("house", "houses"),
    ("star", "stars"),
    ("river", "rivers"),
    ("lamp", "lamps"),
    ("key", "keys"),
    ("day", "days"),
    ("boat", "boats"),
    ("deer", "deer"),
    ("sheep", "sheep"),
)

PAST_TENSES: tuple[tuple[str, str], ...] = (
    ("go", "went"),
    ("see", "saw"),
    ("eat", "ate"),
    ("run", "ran"),
    ("sing", "sang"),
    ("swim", "swam"),
    ("write", "wrote"),
    ("read", "read"),
    ("give", "gave"),
    ("take", "took"),
    ("make", "made"),
    ("find", "found"),
    ("think", "thought"),
    ("bring", "brought"),
    ("buy", "bought"),
    ("catch", "caught"),
    ("teach", "taught"),
    ("sleep", "slept"),
    ("keep", "kept"),
    ("build", "built"),
    ("know", "knew"),
    ("grow", "grew"),
    ("fly", "flew"),
    ("draw", "drew"),
    ("speak", "spoke"),
    ("break", "broke"),
    ("choose", "chose"),
    ("drive", "drove"),
    ("ride", "rode"),
    ("begin", "began"),
    ("drink", "drank"),
    ("tell", "told"),
    ("sell", "sold"),
    ("hold", "held"),
    ("leave", "left"),
    ("lose", "lost"),
    ("walk", "walked"),
    ("play", "played"),
    ("jump", "jumped"),
    ("help", "helped"),
    ("open", "opened"),
    ("carry", "carried"),
    ("try", "tried"),
    ("stop", "stopped"),
)

NAMES = _listed(
    "Ada Alan Alma Amir Anna Anton Aria Asha Ben Bella Bruno Carla Cleo Clara Dan Dara Diego Dora Eddie Ella Emil Emma "
    "Eva Felix Finn Flora Frida Gala Gina Greta Hana Hugo Ida Igor Ines Iris Ivan Jack Jana Jonas Julia Kai Kara Karl "
    "Kim Lara Lea Leo Lena Lina Lucy Luis Luna Maia Mara Marco Maria Mark Max Maya Mia Mila Mina Nadia Nia Nico Nina "
    "Noah Nora Olga Oliver Omar Oscar Otto Pablo Paula Pia Priya Ravi Rita Robin Rosa Ruth Sam Sara Sasha Selma Simon "
    "Sofia Stella Tara Theo Tim Tina Tom Ugo Uma Vera Victor Viola Walter Wanda Willa Yara Yuri Zoe"
)

JOBS = _listed(
    "baker carpenter doctor farmer fisher gardener librarian mechanic miller nurse painter pilot plumber postman "
    "potter sailor singer smith tailor teacher weaver writer clockmaker beekeeper cook dancer builder shepherd"
)

FOODS = _listed(
    "bread cheese soup rice apples pears plums honey noodles pancakes dumplings porridge lentils mushrooms carrots "
    "beans cherries grapes walnuts olives tomatoes potatoes"
)

THINGS = _listed(
    "apples books boxes lamps cups keys stones coins pencils shells bottles candles chairs ropes hats boots bells "
    "spoons ribbons maps baskets buttons marbles blankets kettles ladders mirrors clocks brushes drums"
)

MATERIALS = _listed("brass copper wooden silver glass paper clay iron leather woollen golden stone")

COLOUR_NAMES = _listed("red blue green yellow orange purple pink brown black white grey")

ADJECTIVES = _listed(
    "little brave gentle clever curious quiet cheerful kind patient sleepy proud shy merry honest lonely busy"
)

COMMON_WORDS = _listed(
    "apple bird boat book bread bridge candle castle cat chair cloud coat coin cup dog door drum feather fire fish "
    "flower forest fox garden ghost glass hat hill honey horse house island jar key king kite ladder lake lamp leaf "
    "letter lion map mirror moon mountain mouse nest night ocean orange owl paper pear pencil piano pond queen rabbit "
    "rain ring river road rope rose sail sand shell ship shoe snow song spoon star stone storm sun table tiger tower "
    "train tree umbrella valley village violin wagon water wheel wind window winter wolf yard zebra"
)

# function words and other small words, for texts to repeat
SMALL_WORDS = _listed(
    "a an the this that these those is are was were be been am i you he she it we they me him her us them my your his "
    "our their and or but not no yes if then so because when where why how what who which there here now soon later "
    "today tomorrow yesterday in on at by to from with without for of off over under up down out about after before "
    "again all any both each every few many more most much some such only own same than too very can could will would "
    "shall should may might must do does did has have had go goes come comes see say says said make take get got give "
    "find think know want need like look use work call try ask feel seem let put keep begin help talk turn start show "
    "hear play run move live hold bring write sit stand read open close walk hello world test example text sentence "
    "word line thing things time day night year man woman child friend home hand eye place week case point number part "
    "good new first last long great little other old right big high small large next early young important few public "
    "able nice fine well quick slow brown lazy jumps fast one two three four five six seven eight nine ten hi thanks "
    "please welcome morning evening coffee tea music game computer phone server engine router token model page cache"
)
