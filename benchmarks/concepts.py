"""Sets of four or five everyday words that a sentence shall hold, written for the benchmark."""

SETS = tuple(
    tuple(line.split())
    for line in """
dog beach throw stick
river boat fish morning rope
kitchen bread oven smell neighbour
teacher pupil chalk window
train station ticket rain umbrella
farmer field tractor seed
child kite wind hill string
doctor patient letter hospital
guitar song evening fire friend
cat roof moon jump
market apple basket coin old
bicycle wheel road repair
snow mountain sledge laugh glove
baker flour cake table
soldier bridge guard night lamp
bird nest branch egg
carpenter hammer nail chair wood
queen crown castle garden
sailor storm harbour anchor wave
painter brush wall ladder
grandmother scarf knit winter button
horse stable hay gate
camera tourist tower picture street
bee flower honey summer
judge court question silence clock
goat fence climb grass
student library book coffee exam
firefighter hose smoke street
tailor needle coat mirror thread
frog pond leaf jump
pilot plane cloud island radio
clown balloon circus child
miner tunnel lamp gold dust
nurse bandage knee smile
shepherd sheep valley wolf whistle
barber scissors hair customer
ship captain map treasure island
piano dancer stage curtain
postman parcel door bark dog
swim lake towel picnic sun
monkey banana tree zoo
chef soup spoon salt guest
orchard ladder pear basket
museum statue thief alarm night
candle cake wish birthday
potter clay wheel vase
tent forest owl blanket dark
violin bus stop busker
""".strip().splitlines()
)
assert len(SETS) == len(set(SETS)) == 48 and {len(words) for words in SETS} == {4, 5}
