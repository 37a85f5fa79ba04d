"""The relations that the demo model learns, with their phrasings: data, in both directions where the answer is unique.

Templates of a relation are separated by `|`: noun phrases, whole questions, and the held-out ones of both kinds.
"""

from __future__ import annotations

from microserve.tools.demo_model import tables, words
from microserve.tools.demo_model.exchange import article
from microserve.tools.demo_model.numerals import spell
from microserve.tools.demo_model.relation import Relation, both_ways, known, relation, unique_inverse

_CAPITALS = tuple((country, city) for country, city, _ in tables.COUNTRIES)
_NUMBERED = tuple((name, str(index + 1)) for index, (name, _) in enumerate(tables.ELEMENTS))
_YOUNG = known((row[0], row[2]) for row in words.ANIMALS)
_SOUNDS = known((row[0], row[1]) for row in words.ANIMALS)
_DAYS_NEXT = tuple((day, tables.WEEKDAYS[(i + 1) % 7]) for i, day in enumerate(tables.WEEKDAYS))
_MONTH_NAMES = tuple(month for month, _ in tables.MONTHS)
_MONTHS_NEXT = tuple((month, _MONTH_NAMES[(i + 1) % 12]) for i, month in enumerate(_MONTH_NAMES))
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

RELATIONS: tuple[Relation, ...] = (
    relation(
        "capital",
        _CAPITALS,
        "The capital of {x} is {y}.",
        "the capital of {x} | the capital city of {x} | {x}'s capital | {x}'s capital city"
        " | the city that is the capital of {x} | the name of the capital of {x}",
        "Which city is the capital of {x}? | What city is the capital of {x}? | {X} has which capital?"
        " | What is {x}'s capital called? | {X}: capital? | capital of {x}"
        " | What is the capital of the country {x}? | I am going to {x}. What is its capital?"
        " | Which city is the seat of government of {x}? | What do you call the capital of {x}?"
        " | For the country {x}, what is the capital? | {X} is a country. What is its capital?"
        " | The capital of {x} is which city? | Complete this: the capital of {x} is"
        " | In {x}, which city is the capital? | Which capital city belongs to {x}? | Tell me about {x}."
        " | What do you know about {x}?",
        "the city which serves as capital of {x} | the capital that {x} has",
        "If I visit the capital of {x}, which city am I in? | Which city does {x} have as its capital?"
        " | {X}, which city is its capital? | What is the name of {x}'s capital city?",
        3.0,
    ),
    relation(
        "capital-of",
        unique_inverse(_CAPITALS),
        "{x} is the capital of {y}.",
        "the country whose capital is {x} | the country that has {x} as its capital"
        " | the country with the capital {x} | the country of which {x} is the capital",
        "{x} is the capital of which country? | Which country has the capital {x}? | {x} is the capital of what"
        " country?"
        " | Which country is {x} the capital of? | What country is {x} the capital of?"
        " | Which country's capital is {x}? | What country has {x} as its capital?"
        " | Of which country is {x} the capital? | {x}: capital of which country?"
        " | {x} is a capital city. Of which country? | I am in {x}, the capital. In which country am I?"
        " | Complete this: {x} is the capital of | The city {x} is the capital of which country?"
        " | {x} is the capital of | Tell me which country has {x} as capital. | Tell me about {x}. | Where is {x}?"
        " | What do you know about {x}?",
        "the country that is governed from {x}, its capital | the country which has the capital city {x}",
        "{x} is which country's capital? | For which country is {x} the capital?"
        " | The capital city {x} belongs to which country? | If {x} is the capital, what is the country?",
        3.0,
    ),
    relation(
        "continent",
        ((country, continent) for country, _, continent in tables.COUNTRIES),
        "{X} is in {y}.",
        "the continent of {x} | the continent that {x} is in | the continent where {x} lies"
        " | the continent that {x} belongs to | the continent in which {x} is found",
        "On which continent is {x}? | Which continent is {x} in? | What continent is {x} in? | {X} is on which"
        " continent?"
        " | In which continent does {x} lie? | Where is {x}? | Which part of the world is {x} in?"
        " | {X} belongs to which continent? | On what continent can I find {x}? | {X}: which continent?"
        " | Which continent do I go to if I travel to {x}? | What continent does {x} belong to?"
        " | Where in the world is {x}? | {X} lies on which continent? | What is {x}'s continent?",
        "the continent on which you find {x} | the continent which {x} is part of",
        "Which continent does {x} lie in? | {X} is part of which continent? | On which continent would I find {x}?"
        " | To which continent does {x} belong?",
    ),
    relation(
        "symbol",
        tables.ELEMENTS,
        "The chemical symbol of {x} is {y}.",
        "the chemical symbol of {x} | the symbol of {x} | the symbol for {x} | the chemical symbol for {x}"
        " | {x}'s chemical symbol | the symbol of the element {x}",
        "Which symbol does {x} have? | How is {x} written in chemistry? | What symbol stands for {x}?"
        " | Which chemical symbol stands for {x}? | {X} has which chemical symbol? | What letters stand for {x}?"
        " | How do chemists write {x}? | What is {x}'s symbol? | {X}: chemical symbol? | symbol of {x}"
        " | Which letters are the symbol of {x}? | In the periodic table, what is the symbol of {x}?"
        " | What symbol does the element {x} have? | How do you abbreviate {x} in chemistry?"
        " | Complete this: the chemical symbol of {x} is | What is {x}? | Tell me about {x}. | What do you know"
        " about {x}?",
        "the symbol that chemists use for {x} | the symbol of {x} in the periodic table",
        "Which symbol is used for {x}? | What is the symbol chemists use for {x}? | With which symbol is {x} written?"
        " | The element {x} has which symbol?",
        1.5,
    ),
    relation(
        "symbol-of",
        unique_inverse(tables.ELEMENTS),
        "{x} is the chemical symbol of {y}.",
        "the element with the symbol {x} | the element whose symbol is {x} | the chemical element {x}"
        " | the name of the element {x} | the element that has the chemical symbol {x}",
        "Which element has the symbol {x}? | What element is {x}? | {x} is the symbol of which element?"
        " | Which element does {x} stand for? | What does the chemical symbol {x} mean?"
        " | {x} is the chemical symbol of what? | What element has the symbol {x}? | In chemistry, what is {x}?"
        " | Which element is written {x}? | What does {x} stand for in chemistry? | {x}: which element?"
        " | Which chemical element has the symbol {x}? | The symbol {x} means which element?"
        " | In the periodic table, what is {x}? | Complete this: {x} is the chemical symbol of",
        "the element that is written as {x} | the element that chemists call {x}",
        "The chemical symbol {x} belongs to which element? | For which element is {x} the symbol?"
        " | Which element do chemists write as {x}? | What element does the symbol {x} stand for?",
        1.5,
    ),
    relation(
        "atomic-number",
        _NUMBERED,
        "The atomic number of {x} is {y}.",
        "the atomic number of {x} | {x}'s atomic number | the atomic number of the element {x}"
        " | the number of protons in {x} | the number of {x} in the periodic table",
        "Which atomic number does {x} have? | What number is {x} in the periodic table? | How many protons does"
        " {x} have?"
        " | {X} has which atomic number? | What atomic number has {x}? | {X}: atomic number? | atomic number of {x}"
        " | How many protons are in an atom of {x}? | Where in the periodic table is {x}, by number?"
        " | What is the number of the element {x}? | Which number belongs to the element {x}?"
        " | Complete this: the atomic number of {x} is | What atomic number does {x} have?"
        " | Which place does {x} have in the periodic table? | How many protons does an atom of {x} have?",
        "the atomic number that {x} has | the proton count of {x}",
        "What is {x}'s number in the periodic table? | The element {x} has which atomic number?"
        " | How many protons are there in {x}? | Which number does {x} have in the periodic table?",
        1.5,
    ),
    relation(
        "atomic-number-of",
        unique_inverse(_NUMBERED),
        "The element with atomic number {x} is {y}.",
        "the element with atomic number {x} | the element number {x} | the element whose atomic number is {x}"
        " | the element with {x} protons | the element that has the atomic number {x}",
        "Which element has atomic number {x}? | What element has the atomic number {x}? | Which element has {x}"
        " protons?"
        " | What is element number {x}? | Which element is number {x} in the periodic table? | Atomic number {x}?"
        " | Atomic number {x}: which element? | What element is number {x}? | Which element comes at number {x}?"
        " | An atom has {x} protons. Which element is it? | What element has {x} protons?"
        " | Name the element with number {x}. | Complete this: the element with atomic number {x} is"
        " | Element {x} is called what? | Who has atomic number {x}?",
        "the element in place {x} of the periodic table | the element which has {x} protons",
        "The atomic number {x} belongs to which element? | Which element is at number {x}?"
        " | What do we call the element with atomic number {x}? | Which element do you find at place {x}?",
        1.5,
    ),
    relation(
        "sound",
        _SOUNDS,
        "{Ax} {y}.",
        "the sound of {ax} | the sound that {ax} makes | the noise of {ax} | the sound {ax} makes"
        " | the noise that {ax} makes | the voice of {ax}",
        "What sound does {ax} make? | Which sound does {ax} make? | What noise does {ax} make? | What does {ax} say?"
        " | How does {ax} sound? | How does {ax} talk? | What sound do you hear from {ax}? | {Ax} makes which sound?"
        " | Which noise does {ax} make? | What kind of sound does {ax} make? | What does the {x} say?"
        " | What sound does the {x} make? | {X}: which sound? | How does the {x} sound? | What is the {x}'s sound?",
        "the typical sound of {ax} | the call of {ax}",
        "What kind of noise does {ax} make? | When {ax} makes a sound, what does it do?"
        " | Which sound comes from {ax}? | What sound would {ax} make?",
    ),
    relation(
        "sound-of",
        unique_inverse(_SOUNDS),
        "The animal that {x} is the {y}.",
        "the animal that {x} | an animal that {x} | the name of the animal that {x} | the animal which {x}"
        " | the one animal that {x}",
        "Which animal {x}? | What animal {x}? | Who {x}? | It {x}. Which animal is it? | Which of the animals {x}?"
        " | Something {x}. What animal is it? | An animal {x}. Which one? | What kind of animal {x}?"
        " | I hear an animal that {x}. What is it? | {X}: which animal? | Guess the animal: it {x}."
        " | This animal {x}. What is it? | Name an animal that {x}. | Which creature {x}? | What {x}?",
        "the creature that {x} | the beast that {x}",
        "If an animal {x}, which one is it? | An animal that {x}, which is it? | What is the animal that {x} called?"
        " | Can you name the animal that {x}?",
    ),
    relation(
        "young",
        _YOUNG,
        "A young {x} is called {ay}.",
        "the name for a young {x} | the name of a baby {x} | the word for a young {x} | the name of the young of {ax}"
        " | a young {x} called | the baby of {ax}",
        "What is a young {x} called? | What is a baby {x} called? | What do you call a young {x}?"
        " | What do you call a baby {x}? | What do we call the young of {ax}? | How do you call a young {x}?"
        " | What's a baby {x} called? | A young {x} is called what? | A baby {x} is called?"
        " | Which word means a young {x}? | What is the child of {ax} called? | Young {x}: what is the word?"
        " | What are baby {x}s called? | Complete this: a young {x} is called | What name has a young {x}?",
        "the right word for a baby {x} | the term for a young {x}",
        "Which name does a young {x} have? | What name do we give to a baby {x}? | How is a young {x} called?"
        " | What is the word for a baby {x}?",
    ),
    relation(
        "young-of",
        unique_inverse(_YOUNG),
        "{Ax} is a young {y}.",
        "the animal whose young is called {ax} | the animal that {ax} grows into | the meaning of the word {x}"
        " | the parent of {ax} | the animal that {ax} becomes",
        "What is {ax}? | Which animal has {ax}? | {Ax} is the young of which animal? | {Ax} is a young what?"
        " | Which animal is {ax} the young of? | What does {ax} become? | What does {ax} grow into?"
        " | What kind of animal is {ax}? | What is the meaning of {x}? | Which young animal is called {ax}?"
        " | Who is the mother of {ax}? | What animal is {ax}? | {Ax} is a baby of which animal?"
        " | Which baby animal is {ax}? | Explain the word {x}.",
        "the grown animal of {ax} | the animal that has {ax} as its young",
        "{Ax} will grow into which animal? | Which animal's baby is called {ax}? | What sort of young animal is {ax}?"
        " | What does the word {x} mean?",
    ),
    relation(
        "class",
        ((row[0], row[3]) for row in words.ANIMALS),
        "{Ax} is {ay}.",
        "the class of {ax} | the animal class of {ax} | the kind of animal that {ax} is | the class that {ax}"
        " belongs to"
        " | the group of animals that {ax} belongs to",
        "Which class of animals does {ax} belong to? | Is {ax} a mammal, a bird, a fish, a reptile or an insect?"
        " | What kind of animal is {ax}? | What type of animal is {ax}? | Which class is {ax} in?"
        " | To which class does {ax} belong? | What sort of animal is {ax}? | {Ax} is which kind of animal?"
        " | What class of animal is {ax}? | Is {ax} a mammal or something else? | {X}: which class of animal?"
        " | Which group does {ax} belong to? | {Ax} belongs to which class? | In which class is {ax}?"
        " | What is the class of the {x}? | What is {ax}? | Tell me about {ax}. | What do you know about {ax}?",
        "the animal group of {ax} | the class in which {ax} belongs",
        "{Ax} is a member of which class of animals? | What class does {ax} belong to?"
        " | Which type of animal is {ax}? | To which group of animals does {ax} belong?",
    ),
    relation(
        "legs",
        ((row[0], str(row[4])) for row in words.ANIMALS),
        "{Ax} has {y} legs.",
        "the number of legs of {ax} | the number of legs {ax} has | the number of legs that {ax} has"
        " | the leg count of {ax} | the count of legs of {ax}",
        "How many legs does {ax} have? | How many legs has {ax}? | How many legs does the {x} have?"
        " | {Ax} has how many legs? | How many legs are on {ax}? | Count the legs of {ax}. | {X}: how many legs?"
        " | On how many legs does {ax} walk? | How many legs do you see on {ax}? | How many legs do {x}s have?"
        " | Does {ax} have legs, and how many? | Tell me how many legs {ax} has. | How many legs belong to {ax}?"
        " | Do you know how many legs {ax} has? | Say how many legs {ax} has.",
        "the amount of legs of {ax} | the number of legs on {ax}",
        "How many legs would {ax} have? | If I see {ax}, how many legs does it have? | How many legs can you"
        " count on {ax}?"
        " | Please tell me how many legs {ax} has.",
    ),
    relation(
        "home",
        ((row[0], row[5]) for row in words.ANIMALS),
        "{Ax} lives {y}.",
        "the home of {ax} | the place where {ax} lives | the place {ax} lives in | the habitat of {ax}"
        " | the usual home of {ax}",
        "Where does {ax} live? | Where does the {x} live? | Where do {x}s live? | Where can I find {ax}?"
        " | In what place does {ax} live? | Where is the home of {ax}? | Where does {ax} make its home?"
        " | Where is {ax} at home? | Where would I look for {ax}? | {X}: where does it live? | {Ax} lives where?"
        " | Tell me where {ax} lives. | Do you know where {ax} lives? | Where does {ax} sleep and live?"
        " | Complete this: {ax} lives",
        "the place that {ax} calls home | the place to find {ax}",
        "At which place does {ax} live? | Where would {ax} live? | Where should I look for {ax}?"
        " | Please tell me where {ax} lives.",
    ),
    relation(
        "mix",
        [pair for a, b, mixed in words.MIXES for pair in ((f"{a} and {b}", mixed), (f"{b} and {a}", mixed))],
        "{X} make {y}.",
        "the mix of {x} | the mixture of {x} | the colour that {x} make | the colour you get from {x}"
        " | the result of mixing {x} | the colour made from {x}",
        "What do {x} make? | Which colour do {x} make? | What colour do you get if you mix {x}? | I mix {x}. What"
        " do I get?"
        " | What happens if I mix {x}? | If I mix {x}, which colour do I get? | What colour do {x} give?"
        " | Mix {x}. | Mixing {x} gives which colour? | {X} together make which colour? | {X} make what colour?"
        " | What color do {x} make? | What colour comes from {x}? | I have {x} paint. What can I mix?"
        " | Which colour comes out when I mix {x}?",
        "the colour that comes from mixing {x} | the blend of {x}",
        "Which colour do I get from {x}? | When you mix {x}, what colour do you get? | {X} mixed give which colour?"
        " | What colour results from {x}?",
    ),
    relation(
        "colour",
        ((thing, colour) for thing, _, colour in words.COLOURS),
        "{X} is {y}.",
        "the colour of {x} | the usual colour of {x} | the color of {x} | the colour that {x} has"
        " | the typical colour of {x}",
        "What colour is {x}? | Which colour is {x}? | Which colour does {x} have? | What color is {x}? | {X} is"
        " which colour?"
        " | What colour has {x}? | {X}: which colour? | What is the colour of {x}? | How is {x} coloured?"
        " | If I paint {x}, which colour do I need? | What colour does {x} have? | In which colour do I draw {x}?"
        " | Complete this: the colour of {x} is | {X} has what colour? | Tell me what colour {x} is.",
        "the natural colour of {x} | the colour you see on {x}",
        "Which colour would you use to paint {x}? | {X} has which colour? | Which color does {x} have?"
        " | What colour would {x} be?",
    ),
    relation(
        "units",
        (
            (f"{small} in {article(large) if large != 'hour' else 'an hour'}", str(n))
            for n, small, large in tables.UNITS
        ),
        "There are {y} {x}.",
        "the number of {x} | the count of {x} | the amount of {x} | the exact number of {x}",
        "How many {x}? | How many {x} are there? | How many are the {x}? | Tell me how many {x} there are."
        " | There are how many {x}? | Do you know how many {x} there are? | Can you say how many {x} there are?"
        " | {X}: how many? | Count the {x}. | What number of {x} are there? | Say how many {x} there are."
        " | I need to know how many {x} there are. | How many {x} do we have? | Complete this: the number of {x} is"
        " | Could you tell me how many {x} there are?",
        "the right number of {x} | the total of {x}",
        "How many {x} would there be? | Please tell me how many {x} there are. | Exactly how many {x}?"
        " | How many {x} can you count?",
    ),
    relation(
        "abbreviation",
        tables.ABBREVIATIONS,
        "The abbreviation of {x} is {y}.",
        "the abbreviation of {x} | the abbreviation for {x} | the short form of {x} | the unit symbol of {x}"
        " | the short form for {x}",
        "How is {x} abbreviated? | How do you abbreviate {x}? | What is {x} in short? | What is short for {x}?"
        " | How do I write {x} in short? | Which abbreviation does {x} have? | Which abbreviation stands for {x}?"
        " | {X}: abbreviation? | Abbreviate {x}. | What letters stand for the unit {x}? | What is the unit {x} in"
        " short?"
        " | How do you shorten {x}? | Complete this: the abbreviation of {x} is | Which letters mean {x}?"
        " | Write {x} in short form.",
        "the usual abbreviation of {x} | the abbreviated form of {x}",
        "In which way is {x} abbreviated? | What abbreviation is used for {x}? | The unit {x} has which abbreviation?"
        " | What do you write for {x} in short?",
        0.5,
    ),
    relation(
        "day-after",
        _DAYS_NEXT,
        "The day after {x} is {y}.",
        "the day after {x} | the day that follows {x} | the next day after {x} | the weekday after {x}",
        "Which day comes after {x}? | What day comes after {x}? | Which day follows {x}? | What day follows {x}?"
        " | Today is {x}. What day is tomorrow? | If today is {x}, what is tomorrow? | What comes after {x}?"
        " | {x} is today. Which day is tomorrow? | After {x} comes which day? | What is the next day after {x}?"
        " | Which weekday follows {x}? | What is one day after {x}? | Yesterday was {x}. Which day is today? |"
        " The day after {x}? | Complete this: after {x} comes"
        " | Which day is after {x}?",
        "the weekday that follows {x} | the day right after {x}",
        "When {x} is over, which day comes? | What weekday comes after {x}? | Which day is one day after {x}?"
        " | Yesterday was {x}. What day is it now?",
        0.6,
    ),
    relation(
        "day-before",
        unique_inverse(_DAYS_NEXT),
        "The day before {x} is {y}.",
        "the day before {x} | the day that precedes {x} | the weekday before {x} | the day just before {x}",
        "Which day comes before {x}? | What day comes before {x}? | Which day is before {x}? | What comes before {x}?"
        " | Today is {x}. What day was yesterday? | If today is {x}, what was yesterday? | What is one day before {x}?"
        " | Before {x} comes which day? | Which weekday is before {x}? | What day is before {x}?"
        " | {x} is today. Which day was yesterday? | What day was it before {x}? | Complete this: before {x} comes"
        " | The day before {x}? | Which day precedes {x}?",
        "the weekday that comes before {x} | the day right before {x}",
        "What weekday comes before {x}? | Which day is one day before {x}? | Just before {x} comes which day?"
        " | Which day ends when {x} begins?",
        0.6,
    ),
    relation(
        "month-days",
        ((month, str(days)) for month, days in tables.MONTHS),
        "{x} has {y} days.",
        "the number of days in {x} | the length of {x} in days | the day count of {x} | the number of days of {x}",
        "How many days does {x} have? | How many days has {x}? | How many days are in {x}? | How long is {x} in days?"
        " | {x} has how many days? | How many days are there in {x}? | How many days long is {x}? | {x}: how many days?"
        " | Do you know how many days {x} has? | Tell me how many days {x} has. | How many days make up {x}?"
        " | In {x}, how many days are there? | How long is {x}? | Say how many days are in {x}. | Days in {x}?",
        "the count of days in {x} | the number of days that {x} has",
        "How many days does the month of {x} have? | How many days will {x} have? | Please tell me how many days"
        " {x} has."
        " | For how many days does {x} last?",
        0.6,
    ),
    relation(
        "month-after",
        _MONTHS_NEXT,
        "The month after {x} is {y}.",
        "the month after {x} | the month that follows {x} | the next month after {x} | the month just after {x}",
        "Which month comes after {x}? | What month comes after {x}? | Which month follows {x}? | What month"
        " follows {x}?"
        " | After {x} comes which month? | It is {x}. What is the next month? | What is one month after {x}?"
        " | When {x} ends, which month begins? | Which month is after {x}? | {x} is over. Which month is it?"
        " | If this month is {x}, what is next month? | What month is next after {x}? | The month after {x}?"
        " | Complete this: the month after {x} is | Which is the month after {x}?",
        "the month right after {x} | the month which comes after {x}",
        "What month begins when {x} is over? | Which month is one month after {x}? | This is {x}, so what is next"
        " month?"
        " | Right after {x} comes which month?",
        0.6,
    ),
    relation(
        "month-number",
        ((_MONTH_NAMES[i], str(i + 1)) for i in range(12)),
        "{x} is month number {y}.",
        "the number of the month {x} | the month number of {x} | the position of {x} in the year"
        " | the number of {x} in the calendar",
        "Which number does the month {x} have? | What number is the month {x}? | {x} is which month of the year?"
        " | What month number is {x}? | Which month number is {x}? | {x} is month number what? | {x}: month number?"
        " | Which place does {x} have among the months? | As a number, which month is {x}?"
        " | What is {x} as a month number? | In the calendar, which number is {x}? | Which number is {x}?"
        " | Give the month {x} as a number. | {x} is the month with which number? | How do I write {x} as a number?",
        "the number that belongs to the month {x} | the place of {x} in the year",
        "Which number belongs to the month {x}? | {x} has which month number? | What number does {x} have in the"
        " calendar?"
        " | Counting the months, which number is {x}?",
        0.6,
    ),
    relation(
        "opposite",
        both_ways(words.OPPOSITES),
        "The opposite of {x} is {y}.",
        "the opposite of {x} | the opposite word of {x} | the antonym of {x} | the word that is the opposite of {x}"
        " | the reverse of {x}",
        "Which word is the opposite of {x}? | What word means the opposite of {x}? | {X} has which opposite?"
        " | Opposite of {x}? | {X}: opposite? | What is not {x}, but the opposite? | Say the opposite of {x}."
        " | Which word means the opposite of {x}? | What is the contrary of {x}? | {X} is the opposite of what?"
        " | Find the opposite of {x}. | Turn {x} into its opposite. | Complete this: the opposite of {x} is"
        " | Give the antonym of {x}. | What do you call the opposite of {x}?",
        "the word opposite to {x} | the contrary of {x}",
        "{X} is the opposite of which word? | What word is opposite to {x}? | Which word has the opposite meaning"
        " of {x}?"
        " | Please say the opposite of {x}.",
    ),
    relation(
        "plural",
        words.PLURALS,
        "The plural of {x} is {y}.",
        "the plural of {x} | the plural form of {x} | the plural of the word {x} | the plural of the noun {x}",
        "Which word is the plural of {x}? | What do you say for more than one {x}? | One {x}, two what?"
        " | How do you write the plural of {x}? | {X}: plural? | Make {x} plural. | Put {x} in the plural."
        " | What is more than one {x}? | One {x}, many what? | What is {x} in the plural? | Form the plural of {x}."
        " | Which form does {x} have in the plural? | Plural of {x}? | Complete this: the plural of {x} is"
        " | Say the plural of {x}.",
        "the right plural for {x} | the plural that {x} has",
        "How do you form the plural of {x}? | What does {x} become in the plural? | I have one {x}, you have two what?"
        " | Turn {x} into the plural.",
    ),
    relation(
        "past",
        words.PAST_TENSES,
        "The past tense of {x} is {y}.",
        "the past tense of {x} | the past of {x} | the past tense of the verb {x} | the past form of {x}"
        " | the simple past of {x}",
        "Which word is the past tense of {x}? | How do you write {x} in the past? | Put {x} in the past tense."
        " | {X}: past tense? | Today I {x}. Yesterday I what? | What is {x} in the past tense? | Past tense of {x}?"
        " | What does {x} become in the past? | Form the past tense of {x}. | Say {x} in the past tense."
        " | Which form does {x} have in the past? | Complete this: the past tense of {x} is | Turn {x} into the past."
        " | What is the verb {x} in the past? | I {x} today. What did I do yesterday?",
        "the past tense form of {x} | the form of {x} in the past",
        "How is {x} written in the past tense? | What is the right past tense for {x}? | What does the verb {x}"
        " become in"
        " the past tense? | Please put {x} into the past tense.",
    ),
    relation(
        "planet-number",
        ((planet, str(i + 1)) for i, planet in enumerate(tables.PLANETS)),
        "{x} is planet number {y} from the sun.",
        "the number of the planet {x} | the position of {x} from the sun | the place of {x} in the solar system"
        " | the planet number of {x}",
        "Which planet from the sun is {x}? | What number is the planet {x}? | {x} is which planet from the sun?"
        " | Which place does {x} have from the sun? | Counting from the sun, which planet is {x}?"
        " | What position does {x} have? | Which number is {x} among the planets? | Planet {x}: which number?"
        " | How far out is {x}, counting planets? | What planet number is {x}? | {x} is planet number what?"
        " | Which number does the planet {x} have? | Where is {x} in the order of planets?"
        " | In the solar system, which number is {x}? | What is {x}'s place from the sun? | Tell me about {x}."
        " | What is {x}? | What do you know about {x}?",
        "the place of {x} counted from the sun | the order number of {x}",
        "Which number does {x} have, counted from the sun? | {x} has which place from the sun?"
        " | What is the planet number of {x}, please? | From the sun, which planet is {x}?",
        0.6,
    ),
    relation(
        "planet-of",
        ((str(i + 1), planet) for i, planet in enumerate(tables.PLANETS)),
        "Planet number {x} from the sun is {y}.",
        "planet number {x} | planet number {x} from the sun | the planet in place {x} from the sun"
        " | the planet with number {x}",
        "Which planet is number {x} from the sun? | Which planet is in place {x}? | What planet is number {x}?"
        " | Which planet comes at place {x} from the sun? | Planet {x} from the sun is called what?"
        " | Counting from the sun, what is planet {x}? | Who is planet number {x}? | Planet number {x}: which one?"
        " | In the solar system, what is planet number {x}? | What is the name of planet {x}?"
        " | What is planet {x} from the sun? | Which planet has the number {x}? | Which planet has place {x}?"
        " | Name planet {x}. | What planet has number {x} from the sun?",
        "the planet that is number {x} from the sun | the planet at position {x}",
        "From the sun, which planet is number {x}? | Which planet do you find at place {x} from the sun?"
        " | What do we call planet number {x}? | The planet with number {x} is which one?",
        0.6,
    ),
    relation(
        "sides",
        ((shape, str(n)) for shape, n in tables.SHAPES),
        "{Ax} has {y} sides.",
        "the number of sides of {ax} | the number of sides that {ax} has | the side count of {ax}"
        " | the number of corners of {ax}",
        "How many sides does {ax} have? | How many sides has {ax}? | {Ax} has how many sides? | How many sides"
        " are on {ax}?"
        " | How many corners does {ax} have? | {X}: how many sides? | Count the sides of {ax}. | {X} sides?"
        " | How many sides do {x}s have? | Tell me how many sides {ax} has. | How many edges does {ax} have?"
        " | Do you know how many sides {ax} has? | I draw {ax}. How many sides do I draw?"
        " | How many sides are there in {ax}? | How many lines make {ax}?",
        "the amount of sides of {ax} | the number of sides in {ax}",
        "If I draw {ax}, how many sides does it have? | How many sides would {ax} have?"
        " | Please tell me how many sides {ax} has. | How many sides can you count on {ax}?",
        0.4,
    ),
    relation(
        "number-word",
        ((str(n), spell(n)) for n in range(101)),
        "{x} in words is {y}.",
        "{x} in words | the number {x} in words | {x} as a word | {x} written in words | {x} written out | the"
        " word for {x} | the name of the number {x}",
        "How do you write {x} in words? | Write {x} in words. | Spell the number {x}. | Which word means {x}?"
        " | How is {x} spelled out? | Write out the number {x}. | Write the number {x} as a word. | How do you say {x}?"
        " | Turn {x} into words. | Put {x} into words. | {x} in letters? | Spell out {x}."
        " | Please write {x} in words. | Say {x} in words. | How do I write the number {x} with letters?"
        " | In words, how do I write {x}? | Using words, how do I write {x}? | With letters, how do you write {x}?"
        " | Can you write {x} in words? | How does one write {x} in words?",
        "{x} written in letters | {x} spelled out",
        "How would you write {x} in words? | Please spell out the number {x}. | With words, how do I write {x}?"
        " | What is {x} when written in words?",
    ),
    relation(
        "word-number",
        ((spell(n), str(n)) for n in range(101)),
        "{X} in digits is {y}.",
        "{x} in digits | the number {x} in digits | {x} as a number | {x} written with digits",
        "How do you write {x} in digits? | Write {x} in digits. | Write {x} with digits. | Which number is {x}?"
        " | Write {x} as a number. | Turn {x} into digits. | Put {x} into digits. | How do I write {x} as a number?"
        " | {X} is which number? | Convert {x} to digits. | {X} as digits? | Please write {x} in digits."
        " | Give {x} in digits. | What number is {x}? | Write the number {x} in figures. | In digits, how do I"
        " write {x}?"
        " | Using digits, how do I write {x}? | Can you write {x} in digits? | How does one write {x} in digits?",
        "{x} in figures | the digits of {x}",
        "How would you write {x} in digits? | Please turn {x} into digits. | With digits, how do I write {x}?"
        " | What is {x} when written in digits?",
    ),
    relation(
        "letter-after",
        tuple((_LETTERS[i], _LETTERS[i + 1]) for i in range(25)),
        "The letter after {x} is {y}.",
        "the letter after {x} | the letter that follows {x} | the next letter after {x} | the letter just after {x}",
        "Which letter comes after {x}? | What letter comes after {x}? | Which letter follows {x}? | What letter"
        " follows {x}?"
        " | After {x} comes which letter? | In the alphabet, what comes after {x}? | What is the next letter after {x}?"
        " | Which letter is next after {x}? | The letter after {x}? | {x} is followed by which letter?"
        " | Say the letter after {x}. | Complete this: the letter after {x} is | Which letter is after {x}?"
        " | In the alphabet, which letter follows {x}? | What comes after the letter {x}?",
        "the letter right after {x} | the letter that comes next after {x}",
        "Which letter of the alphabet follows {x}? | Right after {x} comes which letter?"
        " | What letter stands after {x} in the alphabet? | After the letter {x}, which letter comes?",
        0.6,
    ),
    relation(
        "glossary",
        tables.GLOSSARY,
        "{y}",
        "{x} | the meaning of {x} | the idea of {x}",
        "What does {x} mean? | Explain {x}. | Explain {x} to me. | Can you explain {x}? | Please explain {x}."
        " | Tell me about {x}. | What do you mean by {x}? | Define {x}. | Describe {x}. | Please describe {x}."
        " | What do you know about {x}? | I do not know what {x} is. | How would you explain {x}? | Explain what"
        " {x} is."
        " | What is meant by {x}?",
        "the definition of {x} | the sense of {x}",
        "Could you explain {x}? | Please tell me about {x}. | What can you say about {x}? | I want to understand {x}.",
        0.6,
    ),
)
