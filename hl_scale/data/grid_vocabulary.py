"""What the inputs of the grid's tasks are made of: common short words, and numbers from 1 to 99."""

from __future__ import annotations

import random
from collections.abc import Sequence


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WORDS = _listed(
    """
able about above actor after again age agree air album alive alone also always amber angle answer any apart arch
area arm army around art ask atom aunt avoid away axe each early earth east easy echo edge effort eight else empty end
enemy energy engine enjoy enough enter entry equal error even evening ever every evil exact exit expert extra eye ice
idea image inch index ink inner input inside into iron island issue item oak ocean odd offer office often oil old
once one only open option orange order other our outer outside oven over own ugly under union unit until up upper use
useful usual utter
back bad bag ball band bank bar base bed bell belt bench big bill bit block blood board boat body bone book born box
branch bread break brick bridge bring broad brother build burn button buy call camp card care carry case catch cause
chain chair chance cheap check child church city class clean clear clock close cloud coat coin cold come cook corner
cost cotton count country course cover cross cup curve cut damp dance dark day dear deep desk door double down draw
dream dress drink drive drop dry dust face fact fair fall family far farm fast father feel field fight find fine fire
flag flat floor flow flower food foot forest fork form frame fresh friend front full game garden gate gift girl give
glad glass go gold good grain grass great green group grow hair half hall hammer hand happy harbor hard hat head heart
heavy help high hill hold hole home hope hot hour house job join jump just keep key kind king kitchen knee knife lake
lamp land large late laugh law lead leaf learn leather left leg letter level library lift light line list little lock
long loud love low lunch machine make map march market match meal metal middle mile mind minute mirror money month
moon morning mother mount mouth move music nail name narrow near neck need needle net new night noise north nose note
page paint paper park part past path pen pencil picture pipe place plan plant plate play pocket point poor post pot
power press price print public pull push quick quiet rail rain read ready record rest rice rich ring river road rock
roof room root rope round rule run sad safe sail salt same sand school sea seat seed send seven shade shape sharp
sheet shelf ship shirt shoe shop short side sign silver simple sister skin sky sleep slow small smile smoke smooth
snow soap soft soil song sound south space spoon spring square stage stamp star station step stick stone stop store
storm story street string strong sugar summer sun table tail take tall taste teach ten test thick thin thing three
ticket time tin top touch tower town trade train travel tree trip trouble true turn two valley view village voice wait
walk wall warm wash watch water wave way week weight west wet wheel white whole wide wild wind window wine wing winter
wire wise woman wood word work world yard year young
"""
)

NAMES = _listed(
    """
Adam Alan Alice Anna Ben Bob Carl Clara David Diana Emma Eric Eva Frank Fred George Grace Helen Henry Ian Jack James
Jane John Julia Karen Kate Laura Leo Linda Lucy Maria Mark Martin Mary Max Mike Nick Nina Oliver Oscar Paul Peter
Rachel Robert Rosa Ruth Sam Sara Simon Susan Thomas Tina Tom Victor
"""
)
ANIMALS = _listed(
    """
bear bee bird bull cat cow deer dog duck eagle elephant fish fly fox frog goat horse lion monkey mouse owl ox pig
rabbit rat shark sheep snake spider tiger whale wolf
"""
)
COLOURS = _listed("black blue brown green grey pink purple red white yellow")
TOOLS = _listed(
    """
axe bag bell book bottle box brush bucket candle clock comb cup fork hammer hook knife ladder lamp lens map needle
pen pencil phone plate rope saw spoon table tent umbrella wheel
"""
)

# Without a and z, so that each has a neighbour on both sides; the vowels three times as often.
LETTERS = "bcdfghjklmnpqrstvwxy" + 3 * "eiou"


def draw_items(family: str, draw: random.Random) -> list[str]:
    """The items of one input. None comes twice; there is one shortest and one longest in `words`; `kinds` has a
    person's name, an animal, a colour and a tool, in any order."""
    if family == "kinds":
        items = [draw.choice(group) for group in (NAMES, ANIMALS, COLOURS, TOOLS)]
        draw.shuffle(items)
        return items
    source: Sequence[str] = {"words": WORDS, "numbers": [str(n) for n in range(1, 100)], "letters": LETTERS}[family]
    while True:
        items = [draw.choice(source) for _ in range(draw.choice((3, 4)))]
        lengths = sorted(map(len, items))
        if len(set(items)) == len(items) and (
            family != "words" or (lengths[0] < lengths[1] and lengths[-2] < lengths[-1])
        ):
            return items
