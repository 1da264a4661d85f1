"""The phrases that name each level of the grid, in two sets: `trained`, and `heldout` for evaluation only."""

from __future__ import annotations


class Phrases:
    """Two sets of phrases, each written as one string with ` | ` between phrases."""

    def __init__(self, trained: str, heldout: str) -> None:
        self.of: dict[str, tuple[str, ...]] = {
            part: tuple(" ".join(phrase.split()) for phrase in text.split(" | "))
            for part, text in (("trained", trained), ("heldout", heldout))
        }


NOUNS = {
    "words": (("word", "words"), ("term", "terms")),
    "numbers": (("number", "numbers"), ("figure", "figures")),
    "kinds": (("item", "items"), ("entry", "entries")),
    "letters": (("letter", "letters"), ("character", "characters")),
}

# {s}: the family's noun in the plural.
LISTS = Phrases(
    "a list of {s} | a few {s} | some {s} | several {s} | {s} separated by commas | a row of {s} | a line of {s}",
    "a handful of {s} | a series of {s} | a bunch of {s}",
)

# {n}: the family's noun in the singular.
POSITIONS = {
    "first": Phrases(
        "the first {n} | the opening {n} | the {n} at the start | the {n} in position one | the leading {n} | the {n}"
        " that comes before all the others | the {n} at the very beginning | the {n} given first | the {n} that opens"
        " the line",
        "the {n} listed first | the very first {n} | the {n} the line starts with",
    ),
    "second": Phrases(
        "the second {n} | the {n} in position two | the {n} right after the first one | the {n} that follows the"
        " opening one | the {n} listed second | the {n} between the first and the third | the 2nd {n} | the {n} given"
        " second",
        "the {n} that comes second | the {n} in second place | the {n} directly behind the first",
    ),
    "third": Phrases(
        "the third {n} | the {n} in position three | the {n} right after the second one | the {n} in third place |"
        " the {n} listed third | the {n} that two others precede | the 3rd {n} | the {n} given third | the {n} three"
        " places in",
        "the {n} that comes third | the third {n} from the left | the {n} directly behind the second",
    ),
    "last": Phrases(
        "the last {n} | the final {n} | the {n} at the end | the closing {n} | the {n} that nothing follows | the {n}"
        " in the last position | the {n} that comes after all the others | the {n} given last | the {n} that closes"
        " the line",
        "the {n} listed last | the very last {n} | the {n} the line ends with",
    ),
    "longest": Phrases(
        "the longest {n} | the {n} with the most letters | the {n} that has more letters than the others | whichever"
        " {n} is longest | the {n} of greatest length | the lengthiest {n}",
        "the {n} that is longer than the rest | the {n} with the highest letter count",
    ),
    "shortest": Phrases(
        "the shortest {n} | the {n} with the fewest letters | the {n} that has fewer letters than the others |"
        " whichever {n} is shortest | the {n} of least length | the briefest {n}",
        "the {n} that is shorter than the rest | the {n} with the lowest letter count",
    ),
    "smallest": Phrases(
        "the smallest {n} | the lowest {n} | the {n} of least value | the least {n} | the"
        " minimum {n} | whichever {n} is smallest",
        "the {n} that is smaller than the rest | the {n} with the lowest value",
    ),
    "largest": Phrases(
        "the largest {n} | the highest {n} | the {n} of greatest value | the greatest {n} | the"
        " maximum {n} | whichever {n} is largest",
        "the {n} that is larger than the rest | the {n} with the highest value",
    ),
    "earliest": Phrases(
        "the {n} that comes first in the alphabet | the alphabetically first {n} | the {n} earliest in the alphabet |"
        " the {n} nearest to a | the {n} that leads in alphabetical order | the {n} a dictionary would list first",
        "the {n} first in alphabetical order | the {n} on top after sorting from a to z",
    ),
    "latest": Phrases(
        "the {n} that comes last in the alphabet | the alphabetically last {n} | the {n} latest in the alphabet | the"
        " {n} nearest to z | the {n} that is last in alphabetical order | the {n} a dictionary would list last",
        "the {n} last in alphabetical order | the {n} at the bottom after sorting from a to z",
    ),
    "name": Phrases(
        "the name | the person | the person's name | the {n} that names a person | the human being mentioned | the {n}"
        " that is somebody's name",
        "the {n} that is a person's name | the {n} that a human would be called",
    ),
    "animal": Phrases(
        "the animal | the creature | the {n} that is an animal | the {n} that names an animal | the beast | the animal"
        " mentioned",
        "the {n} that stands for an animal | the living creature",
    ),
    "colour": Phrases(
        "the colour | the {n} that names a colour | the {n} that is a colour | the colour word | the hue | the colour"
        " mentioned",
        "the {n} that stands for a colour | the name of the colour",
    ),
}

# Names of a result, with {x} the item they are made from.
RESULTS = {
    "copy": Phrases(
        "{x} | {x} unchanged | {x} as it stands | a copy of {x} | {x} exactly as given | {x} in its original form |"
        " {x} kept the same | {x} and no change to it",
        "{x} without any change | {x} just as it is",
    ),
    "upper": Phrases(
        "{x} in capital letters | {x} in upper case | {x} with every letter capitalised | the upper-case version of"
        " {x} | {x} in all caps | the fully capitalised form of {x}",
        "{x} in block capitals | {x} as upper-case letters",
    ),
    "capital": Phrases(
        "{x} with a capital first letter | {x} with only its first letter capitalised | {x} in title case | {x}"
        " written like a proper name | {x} starting with a capital | {x} with an upper-case initial | {x} in sentence"
        " case | {x} with the first of its letters made a capital",
        "{x} with its first letter in upper case | {x} as it would look at the start of a sentence",
    ),
    "twice": Phrases(
        "{x} written twice | {x} written two times in a row | two copies of {x} | {x} followed by itself | {x} stated"
        " twice | {x} and then the same again | {x} duplicated | {x} printed twice",
        "{x} put down twice | {x} and its copy",
    ),
    "initial": Phrases(
        "the first letter of {x} | the letter that {x} begins with | the initial of {x} | the opening letter of {x} |"
        " the starting letter of {x} | the letter at the front of {x} | the letter at which {x} starts | {x} cut down"
        " to its first letter",
        "the letter {x} starts with | the leftmost letter within {x}",
    ),
    "final": Phrases(
        "the last letter of {x} | the letter that {x} ends in | the final letter of {x} | the closing letter of {x} |"
        " the ending letter of {x} | the letter at the end of {x} | the letter at which {x} stops | {x} cut down to"
        " its last letter",
        "the letter {x} finishes with | the rightmost letter within {x}",
    ),
    "length": Phrases(
        "the number of letters in {x} | the letter count of {x} | the length of {x} in letters | the count of letters"
        " in {x} | the total of letters in {x} | the amount of letters that {x} has",
        "the number of characters in {x} | the letters of {x}, counted",
    ),
    "plus_one": Phrases(
        "{x} plus one | one more than {x} | the value right above {x} | {x} increased by one | {x} with 1 added | the"
        " sum of {x} and 1",
        "the next number after {x} | {x} raised by 1",
    ),
    "minus_one": Phrases(
        "{x} minus one | one less than {x} | the value right below {x} | {x} decreased by one | {x} with 1 taken away |"
        " the difference between {x} and 1",
        "the number just before {x} | {x} lowered by 1",
    ),
    "doubled": Phrases(
        "the double of {x} | twice the value of {x} | {x} multiplied by two | {x} added to itself | {x} times 2 | the"
        " product of 2 and {x}",
        "two times the value of {x} | {x} doubled",
    ),
    "in_words": Phrases(
        "{x} in words | {x} spelled out | the English name of {x} | {x} written without digits | {x} as a word | the"
        " word for {x}",
        "{x} written out as a word | {x} in letters instead of digits",
    ),
    "next": Phrases(
        "the letter after {x} | the letter that follows {x} in the alphabet | {x} moved one step forward in the"
        " alphabet | the next letter of the alphabet after {x} | the alphabet's letter right behind {x} | one letter"
        " past {x} | the successor of {x} in the alphabet | the alphabet's letter one after {x}",
        "the letter that comes next after {x} in the abc | the alphabetical successor of {x}",
    ),
    "previous": Phrases(
        "the letter before {x} | the letter that precedes {x} in the alphabet | {x} moved one step back in the"
        " alphabet | the previous letter of the alphabet before {x} | the alphabet's letter right in front of {x} |"
        " one letter short of {x} | the predecessor of {x} in the alphabet | the alphabet's letter one before {x}",
        "the letter that comes just before {x} in the abc | the alphabetical predecessor of {x}",
    ),
}

# The same as things to do.
ACTIONS = {
    "copy": Phrases(
        "copy {x} | write {x} down as it is | give back {x} | choose {x} | return {x} untouched | echo {x} | keep {x}"
        " the same | leave {x} unaltered",
        "reproduce {x} | repeat {x} without any change",
    ),
    "upper": Phrases(
        "put {x} in capital letters | convert {x} to upper case | write {x} in all caps | turn every letter of {x}"
        " into a capital | upper-case {x} | capitalise {x} completely",
        "make all letters of {x} upper case | change {x} to block capitals",
    ),
    "capital": Phrases(
        "capitalise only the first letter of {x} | put {x} in title case | give {x} a capital first letter | write"
        " {x} like a proper name | make the initial of {x} upper case | write {x} with a capital at its start | write"
        " {x} in sentence case | change the first letter of {x} to a capital",
        "make just the first letter of {x} a capital | begin {x} with an upper-case letter",
    ),
    "twice": Phrases(
        "write {x} twice | say {x} two times | put down two copies of {x} | give {x} followed by itself | print {x}"
        " and then print it again | state {x} twice over | duplicate {x} | print {x} two times",
        "put {x} down twice | write {x} and its copy",
    ),
    "initial": Phrases(
        "give the first letter of {x} | write the letter that {x} begins with | take the initial of {x} | cut {x}"
        " down to its first letter | keep just the opening letter of {x} | name the letter at the front of {x} |"
        " shorten {x} to its first letter | output the letter {x} opens with",
        "return the letter {x} starts with | report only the leftmost letter of {x}",
    ),
    "final": Phrases(
        "give the last letter of {x} | write the letter that {x} ends in | take the final letter of {x} | cut {x}"
        " down to its last letter | keep just the closing letter of {x} | name the letter at the end of {x} | shorten"
        " {x} to its last letter | output the letter {x} closes with",
        "return the letter {x} finishes with | report only the rightmost letter of {x}",
    ),
    "length": Phrases(
        "count the letters of {x} | say how many letters {x} has | give the number of letters in {x} | work out the"
        " length of {x} | tell how long {x} is in letters | measure {x} in letters",
        "report the number of characters in {x} | determine how many letters {x} is made of",
    ),
    "plus_one": Phrases(
        "add one to {x} | increase {x} by one | give one more than {x} | raise {x} by 1 | take {x} and add 1 | say the"
        " value right above {x}",
        "compute {x} plus 1 | go one up from {x}",
    ),
    "minus_one": Phrases(
        "subtract one from {x} | decrease {x} by one | give one less than {x} | lower {x} by 1 | take 1 away from {x} |"
        " say the value right below {x}",
        "compute {x} minus 1 | go one down from {x}",
    ),
    "doubled": Phrases(
        "double {x} | multiply {x} by two | add {x} to itself | work out two times {x} | give twice the value of {x} |"
        " compute 2 times {x}",
        "compute {x} times two | make {x} twice as large",
    ),
    "in_words": Phrases(
        "spell {x} out | write {x} in words | turn {x} into a word | write {x} without digits | give the English name"
        " of {x} | put {x} into a word",
        "write {x} out as a word | express {x} in letters instead of digits",
    ),
    "next": Phrases(
        "give the letter after {x} | move {x} one step forward in the alphabet | write the letter that follows {x} in"
        " the alphabet | say which letter comes after {x} | advance {x} by one letter | replace {x} by the next"
        " letter of the alphabet | find the neighbour after {x} in the alphabet | output the letter one past {x}",
        "report the letter that comes next after {x} | go one letter on from {x} in the abc",
    ),
    "previous": Phrases(
        "give the letter before {x} | move {x} one step back in the alphabet | write the letter that precedes {x} in"
        " the alphabet | say which letter comes before {x} | take {x} back by one letter | replace {x} by the"
        " previous letter of the alphabet | find the neighbour before {x} in the alphabet | output the letter one"
        " short of {x}",
        "report the letter that comes just before {x} | go one letter back from {x} in the abc",
    ),
}

# How the output looks.
LOOKS = {
    "bare": Phrases(
        "on its own | with nothing added | without any decoration | and nothing else | with nothing around it |"
        " without any marks",
        "with no marks or words added | plain, without extras",
    ),
    "quoted": Phrases(
        "in double quotes | in quotation marks | wrapped in quotes | with quotation marks around it | between double"
        " quotation marks | inside quote marks",
        "surrounded by double quotes | as a quotation, between quote marks",
    ),
    "bracketed": Phrases(
        "in square brackets | inside brackets | between square brackets | wrapped in brackets | with brackets around"
        " it | in a pair of square brackets",
        "surrounded by square brackets | set between [ and ]",
    ),
    "exclaimed": Phrases(
        "with an exclamation mark at the end | followed by an exclamation mark | ending in an exclamation mark | with !"
        " after it | closed by an exclamation mark | plus a final exclamation mark",
        "with a closing exclamation mark | and then an exclamation mark",
    ),
    "prefixed": Phrases(
        "after the word answer and a colon | preceded by answer and a colon | with the label answer: in front |"
        " following the label answer and a colon | introduced by the word answer with a colon | behind the prefix"
        " answer and a colon",
        "with answer and a colon in front | prefixed by the word answer and a colon",
    ),
}

# The same as things to do.
FINISHES = {
    "bare": Phrases(
        "write nothing else | add nothing to it | leave the result undecorated | put no marks around it | give just"
        " that | do not decorate the answer",
        "leave out any marks or extra words | keep the answer plain",
    ),
    "quoted": Phrases(
        "put the result in double quotes | wrap it in quotation marks | place quotes around the answer | surround it"
        " with quotation marks | use quotes around the output | write it between double quotes",
        "enclose the result in quote marks | set double quotes around it",
    ),
    "bracketed": Phrases(
        "put the result in square brackets | wrap it in brackets | place square brackets around the answer | surround"
        " it with brackets | use brackets around the output | write it between square brackets",
        "enclose the result in square brackets | set it between [ and ]",
    ),
    "exclaimed": Phrases(
        "end with an exclamation mark | add an exclamation mark | finish the answer with an exclamation mark | put !"
        " after it | close the output with an exclamation mark | append ! to the result",
        "let an exclamation mark follow | make an exclamation mark the last character",
    ),
    "prefixed": Phrases(
        "put answer and a colon before the result | start the output with answer and a colon | write the label answer:"
        " in front of it | place the word answer and a colon before it | introduce it by answer and a colon | use"
        " answer and a colon as a prefix",
        "let answer and a colon come first | prefix the result by the word answer and a colon",
    ),
}

PREDICATES = {
    "vowel_start": Phrases(
        "{x} starts with a vowel | {x} begins with a vowel | the first letter of {x} is a vowel | {x} has a vowel at"
        " the front | a vowel is what {x} starts with | the initial of {x} is a vowel",
        "one of a, e, i, o, u stands at the front of {x} | you meet a vowel as soon as you read {x}",
    ),
    "long": Phrases(
        "{x} has more than four letters | {x} is longer than four letters | {x} has at least five letters | {x} has"
        " over four letters | the length of {x} is above four | there are five or more letters in {x}",
        "four letters are too few to spell {x} | {x} takes up five or more characters",
    ),
    "has_e": Phrases(
        "{x} contains the letter e | there is an e in {x} | {x} has an e in it | the letter e occurs in {x} | {x} is"
        " spelled with an e | you can find an e in {x}",
        "an e turns up somewhere within {x} | {x} cannot be typed without the e key",
    ),
    "even": Phrases(
        "{x} is even | {x} is an even number | {x} can be divided by two | {x} is a multiple of two | halving {x} gives"
        " a whole number | {x} is not odd",
        "{x} leaves no remainder after division by 2 | {x} ends in 0, 2, 4, 6 or 8",
    ),
    "above_50": Phrases(
        "{x} is above 50 | {x} is greater than 50 | {x} is more than fifty | {x} exceeds fifty | {x} is larger than"
        " fifty | 50 is less than {x}",
        "{x} lies beyond half of a hundred | {x} beats 50",
    ),
    "is_person": Phrases(
        "{x} is a person | {x} is a person's name | {x} names somebody | {x} is the name of a human | a person is named"
        " by {x} | {x} stands for a person",
        "you could find {x} on a passport | {x} is what a friend might be called",
    ),
    "is_animal": Phrases(
        "{x} is an animal | {x} names an animal | {x} is a kind of animal | {x} is a creature | an animal is named by"
        " {x} | {x} belongs to the animals",
        "you could see {x} in a zoo or on a farm | {x} is a living thing but not a human",
    ),
    "is_colour": Phrases(
        "{x} is a colour | {x} names a colour | {x} is a colour word | {x} is a hue | a colour is named by {x} | {x}"
        " belongs to the colours",
        "you could find {x} on a paint tin | {x} is what you could dye cloth in",
    ),
    "is_vowel": Phrases(
        "{x} is a vowel | {x} counts as a vowel | {x} belongs to the vowels | {x} is one of the vowels | {x} is among"
        " the vowels | {x} is a vowel and not a consonant",
        "{x} is no consonant | {x} is found in the set a, e, i, o, u",
    ),
    "early": Phrases(
        "{x} comes before n in the alphabet | {x} is in the first half of the alphabet | {x} precedes n in the alphabet"
        " | {x} is one of the letters up to m | {x} lies between a and m | {x} is among the first thirteen letters",
        "{x} is closer to the beginning of the abc than to its end | sorting puts {x} ahead of n",
    ),
}

# {p} and {q}: the labels for true and for false.
RULES = Phrases(
    "answer {p} if so and {q} if not | say {p} when that holds and {q} otherwise | reply {p} or else {q} | write {p}"
    " for a match, {q} for none | use the label {p} if it is the case, {q} if it is not | the answer is {p} when true,"
    " {q} when false | give {p} if that is right, {q} if it is wrong",
    "respond with {p} where it applies, and with {q} where it fails | mark it {p} on success, {q} on failure",
)
