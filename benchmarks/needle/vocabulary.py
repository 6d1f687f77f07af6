"""The closed vocabulary of the synthetic tasks: one word is one token.

The groups never overlap, so a task can be recognised by its words: filler text never contains a key or a value.
"""

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNK)

MARKERS = tuple("remember recall begin end repeat let value list common .".split())

KEYS = tuple(
    """amber basil cedar coral denim ebony flint garnet hazel indigo ivory jade khaki lilac maroon navy ochre olive
    pearl plum quartz ruby russet saffron scarlet sienna silver tawny teal topaz umber violet badger beaver bison
    camel cobra crane dingo eagle falcon ferret gecko gibbon heron hyena ibex jackal koala lemur llama lynx magpie
    marten moose newt ocelot otter panda puffin raven salmon tapir walrus""".split()
)

VALUES = tuple(
    """acorn almond anise apple apricot banana barley beet bread butter cabbage carrot cashew celery cherry chili
    cider clove cocoa coffee cookie cress cumin curry date dill fennel fig garlic ginger grape honey kale leek lemon
    lentil lime mango maple melon millet mint mustard nutmeg oat onion orange papaya parsley peach peanut pear
    pepper pickle potato pumpkin quince radish raisin rice sesame tomato turnip vanilla""".split()
)

TEXT = tuple(
    """a about after again all along also always and any are around as at away back be because been before both but
    by came can close could day did down each even every far few first for found from gave go good great had has have
    he her here high him house how if in into it just keep kept know last left light like line little long look made
    many more most never new next night now of off often on one open or other our out over own part""".split()
)

RARE = tuple(
    """abacus anvil beacon bellows bobbin buckle cannon castle chisel compass copper cradle dagger engine fiddle
    forge gallop goblet hammer harbor helmet hinge kettle ladder lantern lever loom magnet mirror needle oar paddle
    pendulum piston pulley quiver rudder saddle sextant shovel spindle tassel temple thimble trumpet tunnel valve
    wagon""".split()
)

WORDS = SPECIAL + MARKERS + KEYS + VALUES + TEXT + RARE
