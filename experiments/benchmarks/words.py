"""Words of which keys are made: `ADJECTIVES` times `NOUNS` pairs."""

ADJECTIVES = tuple(
    """
    able agile alert ample amused ancient angry aware bare basic bitter blank blind blunt bold brave brief bright
    brisk     broad busy calm careful cheap cheerful chilly clean clear clever cloudy clumsy coarse cold common cool
    cozy crisp     curious curly damp dark deep dense dim distant dizzy dry dull dusty eager early easy elegant empty
    even exact faint     fair faithful famous fancy fast fearless few fierce final fine firm flat fluffy foggy formal
    frank free frequent     fresh friendly frosty full funny gentle genuine giant glad gleaming global gloomy golden
    graceful grand grateful     great green grim handy happy harsh hasty heavy helpful hidden high hollow honest huge
    humble hungry icy ideal idle     jolly keen kind large late lazy light little lively local lonely long loose loud
    loyal lucky mellow mighty mild     misty modern modest muddy narrow neat nervous new nimble noble noisy odd old
    open orange orderly outer pale patient     perfect plain playful polite poor popular precise pretty proud pure
    quaint quick quiet rapid rare raw ready real     recent rich ripe robust rough round royal rusty sacred safe salty
    scarce secret serene shallow sharp shiny short     shy silent silky simple sincere sleepy slim slow small smart
    smooth soft solid sour spare spicy square stable steady     steep sticky stiff still stormy strange strict strong
    stubborn sturdy subtle sudden sunny sweet swift tall tame tasty     tender thick thin thirsty tidy tiny tired
    tough tricky true unique upset usual vague vast vital vivid warm wary wavy     weak wealthy wet whole wide wild
    wise witty wooden worthy young zany zesty
    """.split()
)
NOUNS = tuple(
    """
    acorn actor album alley altar amber anchor ankle apple apron arch arena armor arrow atlas attic author autumn
    badge     badger bagel ballad bamboo banjo banner barley barn barrel basin basket beach beacon beard beetle bell
    bench berry     bicycle birch blanket blossom boat bottle boulder bowl bracelet branch brass bread brick bridge
    bronze brook broom     bucket buckle button cabin cabinet cactus camel camera canal candle canoe canvas canyon
    captain caravan cargo carpet     carriage carrot castle cavern cedar cellar chain chair chalk chapel cherry chest
    chimney cider circle cliff clock     cloud clover coast cobalt coffee collar comet compass copper coral cotton
    cradle crane crater cricket crown crystal     curtain cushion daisy dancer desert diary dolphin domino dragon
    drawer drum eagle easel ember engine falcon farmer     feather fence fern ferry fiddle flag flame flute forest
    fossil fountain fox frame galaxy garden garlic gate ginger     glacier glove goblet granite grape guitar hammer
    harbor harp hazel helmet hill honey horizon horn inlet island ivory     jacket jasmine jewel jungle kettle kite
    ladder lagoon lamp lantern lemon leopard letter library lily linen lizard     lobster locket magnet mango mantle
    maple marble market meadow medal melon meteor mirror monkey mosaic moss mountain     museum nectar needle nest
    oasis ocean olive onion orchard orchid otter oven oyster paddle palace panther paper parade     parrot peach pearl
    pebble pencil pepper piano pigeon pillar planet plaza plum pocket pond poppy prairie pumpkin puzzle     quartz
    quill rabbit raft ranch raven ribbon river robin rocket rope saddle salmon sandal sapphire satchel scarf sculptor
    shadow shell shovel silver sparrow spider spoon spruce stable statue stone stream summit sunset table tailor
    temple     thimble thistle thunder tiger timber topaz torch tower trumpet tulip tunnel turtle valley vase velvet
    village violet     volcano wagon walnut waterfall whale wheel whistle willow window winter wizard zebra zephyr
    """.split()
)
