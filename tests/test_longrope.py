"""The LongRoPE lists against the published ones, and contexts beyond the trained length."""

import pytest
import torch

from minicpm4_hf import MiniCPM4Config, build_config, extend_context, longrope_factors
from minicpm4_hf.longrope import extend_factors
from minicpm4_hf.modeling_minicpm4 import MiniCPM4RotaryEmbedding

# Source: config.json of openbmb/MiniCPM4-8B.
LIST_8B = """
0.9977997200264581 1.014658295992452 1.0349680404997148 1.059429246056193 1.0888815016813513 1.1243301355211495
1.166977103606075 1.2182568066927284 1.2798772354275727 1.3538666751582975 1.4426259039919596 1.5489853358570191
1.6762658237220625 1.8283407612492941 2.0096956085876183 2.225478927469756 2.481536379650452 2.784415934557119
3.1413289096347365 3.560047844772632 4.048719380066383 4.615569542115128 5.2684819496549835 6.014438591970396
6.858830049237097 7.804668263503327 8.851768731513417 9.99600492938444 11.228766118181639 12.536757560834843
13.902257701387796 15.303885189125953 16.717837610115794 18.119465097853947 19.484965238406907 20.792956681060105
22.02571786985731 23.16995406772833 24.217054535738416 25.16289275000465 26.007284207271347 26.753240849586767
27.40615325712662 27.973003419175363 28.461674954469114 28.880393889607006 29.237306864684626 29.540186419591297
29.79624387177199 30.01202719065413 30.193382037992453 30.34545697551969 30.47273746338473 30.579096895249787
30.66785612408345 30.741845563814174 30.80346599254902 30.85474569563567 30.897392663720595 30.932841297560394
30.962293553185553 30.986754758742034 31.007064503249293 31.02392307921529
"""
# Source: OpenBMB/CPM.cu `cpmcu/common/utils.py`, the list for 128K.
LIST_8B_128K = """
0.9977997200264581 1.014658295992452 1.0349680404997148 1.059429246056193 1.0888815016813513 1.1243301355211495
1.166977103606075 1.2182568066927284 1.2798772354275727 1.3538666751582975 1.4426259039919596 1.5489853358570191
1.6762658237220625 1.8283407612492941 2.0096956085876183 2.225478927469756 2.481536379650452 2.784415934557119
3.1413289096347365 3.560047844772632 4.048719380066383 4.752651957515948 5.590913044973868 6.584005926629993
7.7532214876576155 9.119754865903639 10.704443927019176 12.524994176518703 14.59739595363613 16.93214476166354
19.53823297353041 22.417131025031697 25.568260840911098 28.991144156566317 32.68408069090375 36.65174474170465
40.90396065611201 45.4664008671033 50.37147343433591 55.6804490772103 61.470816952306556 67.8622707390618
75.00516023410414 83.11898235973767 92.50044360202462 103.57086856690864 116.9492274587385 118.16074567836519
119.18497548708795 120.04810876261652 120.77352815196981 121.38182790207875 121.89094985353891 122.31638758099915
122.6714244963338 122.9673822552567 123.21386397019609 123.41898278254268 123.58957065488238 123.73136519024158
123.84917421274221 123.94701903496814 124.02825801299717 124.09569231686116
"""
# Source: OpenBMB/CPM.cu#32; the first half only was published.
LIST_41_FIRST_HALF = """
0.9982316082870433 1.0330481534225833 1.074992095648472 1.1255096879436188 1.1863348602111472 1.2595438289025784
1.3476188888731144 1.4535223827776367 1.5807816745852978 1.733585604948952 1.9168922912975777 2.136547140413532
2.399408420011864 2.713475511863601 3.0880118452194125 3.533650295140153 4.062463396503131 4.687974098908331
5.425075306704036 6.28981896795635 7.299029627227207 8.469695779093662 9.818098773066547 11.358657902065278
13.102505860712085 15.055862949967125 17.21834813136418 19.581439255386446 22.12735331465672 24.82863384937658
27.648682077177497 30.543340961088283
"""
# Source: MiniCPM README, the section on 128K for MiniCPM4.1.
LIST_41_128K = """
0.9982316082870437 1.033048153422584 1.0749920956484724 1.1255096879436193 1.1863348602111476 1.259543828902579
1.3476188888731149 1.4535223827776373 1.5807816745852985 1.7335856049489526 1.9168922912975785 2.1365471404135326
2.3994084200118646 2.713475511863602 3.0880118452194134 3.533650295140154 4.062463396503134 4.687974098908333
5.425075306704039 6.289818967956352 7.29902962722721 8.6357018163639 10.210822723989212 12.053807765671676
14.193944598909404 16.65780676784363 19.463620727694074 22.628311203524586 26.150106147261315 30.02526691405111
34.23183327975347 38.73811934094828 43.502489489729555 48.47627117965394 53.61139491762471 58.857366522037935
64.16798299215064 69.51359464319125 74.86555458220285 80.21497790341579 85.55322183307433 90.89611806932027
96.26245306514224 101.68269304046481 107.18619510219668 112.82253283014026 118.63764063163615 119.88866203644656
120.9462882391725 121.837565139014 122.58663780572562 123.2147719894291 123.74049454862576 124.17980424685767
124.54641761955492 124.85202548028222 125.10654406389756 125.31835105170659 125.49450117164764 125.64091910903052
125.76256945356558 125.86360463815589 125.94749252260765 126.01712561287873
"""
# Source: the config files of the checkpoints with head size 64, published in float32.
LIST_HEAD_64 = """
1.0004360675811768 1.0668443441390991 1.1631425619125366 1.3025742769241333 1.5040205717086792 1.7941505908966064
2.2101221084594727 2.802666664123535 3.6389970779418945 4.804192543029785 6.39855432510376 8.527148246765137
11.277542114257812 14.684998512268066 18.69317054748535 23.13019371032715 27.72362518310547 32.1606559753418
36.168827056884766 39.57627868652344 42.32667541503906 44.45526885986328 46.04962921142578 47.21482849121094
48.05115509033203 48.64370346069336 49.05967712402344 49.34980392456055 49.551246643066406 49.69068145751953
49.78697967529297 49.85338592529297
"""

# name -> (published list, largest relative error)
PUBLISHED = {
    "MiniCPM4-8B": (LIST_8B, 1e-14),
    "MiniCPM4.1-8B": (LIST_41_FIRST_HALF, 1e-14),
    "MiniCPM4-0.5B": (LIST_HEAD_64, 1e-6),
}
PUBLISHED_128K = {"MiniCPM4-8B": (LIST_8B_128K, 4), "MiniCPM4.1-8B": (LIST_41_128K, 2)}
NAMES_8B = sorted(PUBLISHED_128K)


def numbers(text):
    return [float(word) for word in text.split()]


@pytest.mark.parametrize("name", PUBLISHED)
def test_base_lists(name):
    published, tolerance = PUBLISHED[name]
    published = numbers(published)
    assert longrope_factors(name)[: len(published)] == pytest.approx(published, rel=tolerance, abs=0)


def test_list_lengths_are_half_the_head_size():
    assert {name: len(longrope_factors(name)) for name in PUBLISHED} == {
        "MiniCPM4-8B": 64,
        "MiniCPM4.1-8B": 64,
        "MiniCPM4-0.5B": 32,
    }
    # The last value is known for 4.1 too, to fewer digits.
    assert longrope_factors("MiniCPM4.1-8B")[-1] == pytest.approx(63.00856281, abs=5e-9)


def test_unknown_list():
    with pytest.raises(ValueError, match="known ones are MiniCPM4-8B, "):
        longrope_factors("MiniCPM3")


@pytest.mark.parametrize("name", NAMES_8B)
def test_128k_lists(name):
    published, scale = PUBLISHED_128K[name]
    published = numbers(published)
    factors = extend_factors(longrope_factors(name), scale)
    assert factors == pytest.approx(published, rel=5e-5, abs=0)
    assert factors[:21] == longrope_factors(name)[:21]
    assert factors[46:] == [scale * factor for factor in longrope_factors(name)[46:]]
    extended = extend_context(build_config(name), 131072)
    assert extended.rope_parameters["long_factor"] == pytest.approx(published, rel=5e-5, abs=0)


@pytest.mark.parametrize("name", NAMES_8B)
@pytest.mark.parametrize("length", [131072, 200_000, 262144])
def test_extended_config(name, length):
    config = build_config(name)
    before = config.to_dict()
    extended = extend_context(config, length)
    rope = extended.rope_parameters
    assert config.to_dict() == before
    assert extended.max_position_embeddings == length
    assert rope["short_factor"] == rope["long_factor"]
    assert rope["original_max_position_embeddings"] == config.max_position_embeddings
    assert rope["factor"] == 1.0


@pytest.mark.parametrize("name", NAMES_8B)
def test_extending_twice_is_extending_once(name):
    config = build_config(name)
    once = extend_context(config, 262144).rope_parameters["long_factor"]
    twice = extend_context(extend_context(config, 131072), 262144).rope_parameters["long_factor"]
    assert twice == pytest.approx(once, rel=1e-14, abs=0)


@pytest.mark.parametrize("name", NAMES_8B)
def test_a_shorter_length_changes_nothing(name):
    config = build_config(name)
    assert extend_context(config, config.max_position_embeddings).to_dict() == config.to_dict()
    assert extend_context(config, 4096).to_dict() == config.to_dict()


@pytest.mark.parametrize("name", NAMES_8B)
@pytest.mark.parametrize("length", [None, 131072], ids=["trained", "128K"])
def test_rotary_tables(name, length):
    """cos^2 + sin^2 is the attention factor squared: 1; the angle is position / (factor * theta^(2i/D))."""
    config = build_config(name, num_hidden_layers=1, vocab_size=8)
    if length is not None:
        config = extend_context(config, length)
    position = config.max_position_embeddings - 1
    rotary = MiniCPM4RotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1, 1, 1), torch.tensor([[0, 1, position]]))
    assert rotary.attention_scaling == 1.0
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))
    factors = torch.tensor(config.rope_parameters["long_factor"], dtype=torch.float64)
    angle = 1 / (factors * 10000.0 ** (torch.arange(64, dtype=torch.float64) / 64))
    torch.testing.assert_close(sin[0, 1, :64].double(), angle.sin(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sin[0, 1, 64:], sin[0, 1, :64])


def test_attention_factor_survives_a_saved_config(tmp_path):
    extend_context(build_config("MiniCPM4-8B"), 131072).save_pretrained(tmp_path)
    rotary = MiniCPM4RotaryEmbedding(MiniCPM4Config.from_pretrained(tmp_path))
    assert rotary.attention_scaling == 1.0


def test_refusals():
    with pytest.raises(ValueError, match="needs LongRoPE factors, got rope type 'default'"):
        extend_context(MiniCPM4Config(), 65536)
    config = build_config("MiniCPM4-8B")
    config.rope_parameters["short_factor"] = [1.0] * 64
    with pytest.raises(ValueError, match="needs equal `short_factor` and `long_factor`"):
        extend_context(config, 65536)
