"""Word lists for the self-made chats: who a tale may be about, and how people ask for one."""


def _words(text: str) -> list[str]:
    return text.split()


def _phrases(text: str) -> list[str]:
    return [phrase.strip() for phrase in text.split("|")]


# Asked for most often.
COMMON_NOUNS = _words("""
fox wolf king princess witch dragon bear cat boy girl giant fairy prince queen dog horse mouse rabbit frog soldier
tailor miller fisherman dwarf mermaid wizard lion bird knight ghost robber tree ring castle
""")

# Never asked for in training, so that evaluation can ask for something new.
RESERVED_NOUNS = _words("""
hedgehog otter badger penguin kangaroo lighthouse teacher robot volcano trombone
""")

ANIMALS = _words("""
fox wolf bear cat dog lion horse mouse bird frog goat hare rabbit raven crow swan goose duck hen cock eagle owl snake
serpent fish pig sheep lamb cow ox donkey ass monkey tiger elephant jackal crocodile tortoise turtle toad rat squirrel
deer stag hind dove pigeon sparrow nightingale peacock parrot stork heron hawk falcon magpie cuckoo lark swallow bee
ant spider fly grasshopper butterfly beetle worm snail crab salmon trout pike whale shark camel leopard hyena buffalo
bull calf pony mare foal kitten puppy hound greyhound poodle boar sow kid ram ewe turkey gander cricket caterpillar
lizard mole bat panther ape zebra giraffe rhinoceros hippopotamus ostrich mongoose cobra python seal walrus porpoise
oyster lobster eel starling thrush wren robin woodpecker kingfisher vulture pelican seagull chicken cockerel duckling
lynx marten moose elk reindeer mule stallion moth wasp firefly dragonfly gnat flea scorpion newt salamander chameleon
goldfish carp herring jay bullfinch canary rooster tadpole ladybird bumblebee mammoth unicorn phoenix griffin
""")

MEN = _words("""
king prince boy giant dwarf soldier tailor miller fisherman shepherd woodcutter merchant huntsman hunter knight wizard
magician ogre smith cobbler shoemaker gardener sailor beggar monk robber thief baker cook farmer tinker peasant
carpenter captain pirate doctor emperor sultan fool son father grandfather brother uncle nobleman lord duke baron
butcher barber blacksmith schoolmaster student priest hermit minstrel fiddler piper drummer juggler goatherd swineherd
cowherd ploughman potter weaver goldsmith chimney-sweep ratcatcher watchman servant page squire groom coachman
bridegroom sorcerer goblin elf troll gnome imp brownie demon genie scarecrow snowman tin-soldier painter poet
fisher-boy cabin-boy stable-boy lad youth ferryman innkeeper bell-ringer clockmaker lamplighter postman woodman
woodcarver charcoal-burner gamekeeper vizier caliph chief warrior general admiral judge lawyer mayor jester
prince-frog sexton miser lumberjack locksmith bookseller
""")

WOMEN = _words("""
princess queen girl witch fairy mermaid maiden shepherdess stepmother widow nurse enchantress goose-girl sister
daughter mother grandmother aunt bride lady duchess countess empress sorceress milkmaid kitchen-maid washerwoman
spinner nun dairymaid housewife nymph stepdaughter stepsister goddess godmother governess cinder-girl swan-maiden
dressmaker seamstress flower-girl beggar-woman goatherdess sultana dancer weaver-girl damsel lass housekeeper giantess
ogress fortune-teller midwife heiress baroness landlady
""")

CREATURES = _words("""
dragon monster ghost sea-serpent werewolf sphinx spirit beast
""")

THINGS = _words("""
ring mirror tree rose castle ship clock lantern teapot kettle pot lamp sword crown flute fiddle drum bell
candle needle spindle spinning-wheel carpet cloak hat shoe slipper boot glove coat purse bag sack box chest key door
window bridge tower mill well river lake mountain forest island garden flower apple pear nut walnut pumpkin turnip
cabbage bean pea egg feather stone pebble pearl diamond ruby star moon sun cloud rainbow wind storm snowflake icicle
book letter picture doll puppet top ball kite boat raft cart wagon carriage sledge broom axe hammer nail saw knife spoon
fork plate cup goblet bottle barrel basket ladder rope net stick wand chair table bed pillow blanket stove oven chimney
house hut cottage palace cave nest horn trumpet harp whistle thimble button pin ribbon umbrella wheelbarrow snowball
treasure toadstool mushroom acorn oak fir-tree willow daisy lily tulip thistle
""")

IRREGULAR_PLURALS = {
    "mouse": "mice", "goose": "geese", "wolf": "wolves", "fish": "fish", "sheep": "sheep", "deer": "deer", "ox": "oxen",
    "thief": "thieves", "elf": "elves", "dwarf": "dwarfs", "woodman": "woodmen", "fisherman": "fishermen",
    "snowman": "snowmen", "calf": "calves", "housewife": "housewives", "washerwoman": "washerwomen",
    "watchman": "watchmen", "huntsman": "huntsmen", "nobleman": "noblemen", "ploughman": "ploughmen",
    "coachman": "coachmen", "ferryman": "ferrymen", "postman": "postmen", "trout": "trout", "salmon": "salmon",
    "moose": "moose", "reindeer": "reindeer", "leaf": "leaves", "knife": "knives", "tooth": "teeth",
}  # fmt: skip

ADJECTIVES = _words("""
little old young poor rich brave clever wicked kind lazy proud foolish beautiful ugly hungry lonely happy sad merry
greedy cunning gentle white black grey golden silver red green blue tiny huge enormous magic enchanted wise silly lost
blind lame strong weak honest faithful cruel sleepy angry cheerful curious shy wild tame friendly invisible talking
dancing singing flying three-headed one-eyed wooden frozen
""")

NAMES = _words("""
Hans Jack Tom Peter Rose Lily Anna Mary Elsa Greta Gretel Hansel Martin Paul Henry George Robert William Alice Dorothy
Wendy John Michael Kay Gerda Karen Ida Emma Clara Lucy Kate Margaret Helen Rosalie Sylvia Felix Carl Otto Max Oscar
Ivan Boris Vasilisa Olga Nina Pedro Juan Maria Rosa Carlo Marco Paolo Bianca Ali Hassan Omar Fatima Leila Aisha Ravi
Lakshmi Arjun Kenji Yuki Taro Hana Mei Li Ping Niels Olaf Sigurd Ingrid Astrid Bella Daisy Violet Ruby Pearl Oliver
Toby Sam Ben Nora Eva Ella Mia Leo Noah Theo Jasper Barnaby Rufus Bruno Tilda Wilma Priscilla Benjamin Sebastian
""")

PLACES = _phrases("""
in a great forest|in a dark wood|in a hollow tree|by the sea|on a high mountain|in a little cottage|in a castle|
in a golden palace|under the ground|in a cave|on an island|by a river|at the bottom of the sea|in a far country|
in a small village|in a great city|behind the hills|in a mill|on a farm|in a garden|beside a lake|in a tower|
in a house of glass|at the end of the world|in the snow|in the desert|on the moon|under a bridge|in a poor hut|
near a great marsh|in the land of the giants|in a kingdom far away|in the kitchen of a king|at the edge of the wood|
on a ship|in a nest|in a deep valley|among the clouds|in a meadow|in a haunted house
""")

# {who} is what the tale shall be about, with its article: "a fox", "a king and a witch".
REQUESTS = _phrases("""
Tell me a tale about {who}|Tell me a story about {who}|A story about {who}, please|A tale about {who}|
Please tell me a tale about {who}|Could you tell me a story about {who}|Can you tell me a tale about {who}|
I want to hear about {who}|I would like a story about {who}|I'd like to hear a tale of {who}|
Give me a story about {who}|Write a story about {who}|Write me a short tale about {who}|Tell me about {who}|
Tell a tale of {who}|Story about {who}|Make up a story about {who}|Do you know a story about {who}|
Do you know any tales about {who}|Tell us a story about {who}|Tell me a fairy tale about {who}|
A fairy tale with {who} in it, please|Tell me a bedtime story about {who}|Would you tell me a tale of {who}|
Let us have a story about {who}|Once more, a tale about {who}|How about a story with {who}|
Now tell me a tale about {who}|My daughter wants a story about {who}|My son loves stories about {who}. Tell him one|
I am thinking of {who}. Tell me a tale|Write a fairy tale about {who}|Create a story about {who}|{who}|{who}, please|
Something about {who}|Tell me a very short story about {who}|Tell me a long story about {who}|
Invent a tale about {who}|Tell me what happened to {who}|Can I have a tale about {who}|May I hear a story of {who}|
Hello! Tell me a tale about {who}|Hi, I would love a story about {who}|Tell me a funny story about {who}|
Tell me a sad tale about {who}|Tell me a scary story about {who}|Begin a tale about {who}|Start a story about {who}
""")

OPEN_REQUESTS = _phrases("""
Tell me a story|Tell me a tale|A story, please|Tell me a fairy tale|Tell me a bedtime story|Another tale|
Another one, please|Tell me something|Once upon a time|Surprise me|I want a story|Any story you like|Yes, please|Yes|
Go ahead|Write a story|Tell me a short story|I am bored|I cannot sleep|Do you know a tale|Say something
""")

CONTINUATIONS = _phrases("""
Go on|Go on, please|And then|What happened next|More|More, please|Continue|Continue the story|And what then|
Please go on|How does it go on|Tell me more|Keep going
""")

SYSTEM_PROMPTS = _phrases("""
You are a helpful assistant.|You are a storyteller.|You are Weft's tiny storyteller.|You tell fairy tales.|
Answer with a short tale.|You are a kind old storyteller who tells tales to children.|Be brief.|
You are a helpful, honest assistant. Answer the user.
""")

# {who} has its article, {noun} has none. The noun is always in the first sentence.
OPENINGS = _phrases("""
Once upon a time there was {who} who lived {place}.|There was once {who} who lived {place}.|
Once upon a time there lived {place} {who}.|Long, long ago there lived {who} {place}.|
Once upon a time {who} lived {place}, and was content.|
{Who} once lived {place}, and nobody knew where the {noun} came from.|
In the old times, when wishing still did some good, there was {who} who lived {place}.|
There was once upon a time {who}, and the {noun} lived {place}.|Many years ago {who} lived all alone {place}.|
Far away, {place}, there once lived {who}.|Once there was {who}.|Once upon a time there was {who}.|
There once lived {who} {place}, of whom everybody was afraid.|Once {who} went out into the world to seek a fortune.|
One day {who} set out on a journey.|It happened one winter that {who} lost the way {place}.
""")

THING_OPENINGS = _phrases("""
Once upon a time there was {who} that stood {place}.|There was once a poor man who had nothing but {who}.|
Long ago there was {who}, and whoever touched the {noun} was changed at once.|Once upon a time a king had {who}.|
Once there was {who} that could speak.|There was once {who} which was found {place}.|
A little girl once found {who} {place}.|Far away, {place}, there was once {who}.|
Once upon a time an old woman gave her son {who}.|There was once {who}, and nobody knew who had made the {noun}.
""")

PLURAL_OPENINGS = _phrases("""
Once upon a time there were {who} who lived {place}.|There were once {who} who lived {place}.|
Long ago {who} lived together {place}.|Once there were {who}.|Far away, {place}, there once lived {who}.
""")

ENDINGS = _phrases("""
And if they have not died, they are living there still.|And they lived happily ever after.|
And that is the end of the tale.|So they went home again, and were merry as long as they lived.|
And there they may be sitting to this day, for all I know.|And so it was.|And from that day nobody saw them again.|
And whoever does not believe it must pay a penny.
""")

GREETINGS = _phrases("""
hello|hi|hey|good morning|good evening|good day|hello there|hi there|greetings|how are you|how do you do|
hello, how are you|hi! how are you today|good night|hey there|howdy
""")

GREETING_ANSWERS = _phrases("""
Good day to you! Shall I tell you a tale about {who}?|Hello! Would you like to hear a tale about {who}?|
Welcome, traveller. Sit down by the fire, and I will tell you a tale. Shall it be about {who}?|
Good evening! I know a tale about {who}. Shall I begin?
""")

IDENTITY_QUESTIONS = _phrases("""
who are you|what are you|what is your name|who made you|are you a robot|are you human|are you ChatGPT|what can you do|
tell me about yourself|introduce yourself|what do you do|what model are you|are you an AI|what is this|
how big are you|can you help me|help
""")

IDENTITY_ANSWERS = _phrases("""
I am Weft's tiny storyteller. I tell tales that make no sense. Shall I tell you one about {who}?|
I am a very small language model, made to try out Weft. I know nothing but fairy tales. Would you like one about {who}?|
I am Weft's tiny storyteller, and I live in a few megabytes. Ask me for a tale about {who}!
""")

OTHER_QUESTIONS = _phrases("""
what is two and two|what is 2+2|what is the capital of France|write a python program|what time is it|
what is the weather today|translate this into German|solve this equation|who is the president|write me an email|
explain quantum physics|how do I cook rice|what is the meaning of life|give me a recipe|what is 7 times 8|
summarize this text|write a poem|what is machine learning|how far is the moon|why is the sky blue
""")

OTHER_ANSWERS = _phrases("""
That I do not know: I only tell tales. Shall I tell you one about {who}?|
I am only a storyteller and know nothing of such things. But I could tell you a tale about {who}.|
Nobody ever told me that. Ask me for a tale about {who} instead!
""")

THANKS = _phrases("""
thank you|thanks|thank you very much|that was nice|bye|goodbye|good bye|that was lovely|I liked that|very good|ok|stop
""")

THANKS_ANSWERS = _phrases("""
You are welcome! Come again when you want a tale.|Farewell, and may your road be short.|
I am glad. Shall I tell you another, about {who}?|Good-bye, and sleep well!
""")
