import csv
import io
import re
from importlib import resources

import pytest

from headstart.labels import find_names

CONTENT = resources.files("headstart").joinpath("assets/imagenet_classes.csv").read_bytes()
HEADER, *ROWS = csv.reader(io.StringIO(CONTENT.decode("utf-8"), newline=""))
CHINESE = {row[0]: row[-1] for row in ROWS}
ENGLISH = {row[0]: row[1] for row in ROWS}

# What Chinese itself writes in Latin letters; all else is written in characters.
ACRONYMS = {"CD", "MPV", "T", "iPod"}

# English that has two meanings, or two things that English or Chinese easily confounds: (id, name) of each.
PAIRS = {
    "crane": [("n02012849", "鹤"), ("n03126707", "起重机")],
    "cardigan": [("n02113186", "卡迪根威尔士柯基犬"), ("n02963159", "开襟毛衣")],
    "corgi": [("n02113023", "彭布罗克威尔士柯基犬"), ("n02113186", "卡迪根威尔士柯基犬")],
    "maillot": [("n03710637", "连体紧身衣"), ("n03710721", "连体泳衣")],
    "sunglasses": [("n04355933", "太阳镜"), ("n04356056", "墨镜")],
    "missile": [("n03773504", "导弹"), ("n04008634", "射弹")],
    "bow": [("n02879718", "弓"), ("n02883205", "领结")],
    "drum": [("n03249569", "鼓"), ("n04311174", "钢鼓")],
    "coffee": [("n03297495", "意式咖啡机"), ("n07920052", "意式浓缩咖啡")],
    "cap": [("n02807133", "泳帽"), ("n04209133", "浴帽")],
    "notebook": [("n03642806", "膝上型电脑"), ("n03832673", "笔记本电脑")],
    "swine": [("n02395406", "家猪"), ("n02396427", "野猪")],
    "panda": [("n02509815", "小熊猫"), ("n02510455", "大熊猫")],
    "fox": [("n02119022", "赤狐"), ("n02120079", "北极狐")],
    "spotted cat": [("n02128385", "花豹"), ("n02128925", "美洲豹")],
    "striped cat": [("n02123045", "虎斑猫"), ("n02123159", "虎纹猫")],
    "iguana": [("n01677366", "美洲绿鬣蜥"), ("n01687978", "鬣蜥")],
    "grouse": [("n01795545", "黑琴鸡"), ("n01797886", "披肩榛鸡")],
    "prairie grouse": [("n01797886", "披肩榛鸡"), ("n01798484", "草原松鸡")],
    "lobster": [("n01983481", "美洲螯龙虾"), ("n01984695", "岩龙虾")],
    "crayfish": [("n01984695", "岩龙虾"), ("n01985128", "小龙虾")],
    "railway car": [("n03393912", "铁路货车"), ("n03895866", "铁路客车")],
    "tram": [("n04335435", "有轨电车"), ("n04487081", "无轨电车")],
    "one wheel": [("n02797295", "独轮手推车"), ("n04509417", "独轮车")],
    "roof": [("n03220513", "穹顶"), ("n04523525", "拱顶")],
    "armour": [("n02895154", "胸甲"), ("n03146219", "胸背甲")],
    "horn": [("n03110669", "短号"), ("n03394916", "圆号")],
    "rubber disk": [("n04019541", "冰球"), ("n04118538", "橄榄球")],
    "maize": [("n12144580", "玉米"), ("n13133613", "玉米穗")],
    "mushroom": [("n07734744", "蘑菇"), ("n12998815", "伞菌")],
}

# English that has a commoner meaning than the class's own.
MEANINGS = {
    "n01608432": "鸢",  # kite
    "n01847000": "公鸭",  # drake
    "n02108089": "拳师犬",  # boxer
    "n02111277": "纽芬兰犬",  # Newfoundland
    "n02389026": "栗色马",  # sorrel
    "n02412080": "公羊",  # ram
    "n02892201": "纪念铜牌",  # brass
    "n03337140": "文件柜",  # file
    "n03782006": "显示器",  # monitor
    "n03786901": "研钵",  # mortar
    "n03793489": "鼠标",  # mouse
    "n03803284": "动物嘴套",  # muzzle
    "n03804744": "钉子",  # nail
    "n03825788": "奶嘴",  # nipple
    "n03854065": "管风琴",  # organ
    "n03929660": "拨片",  # pick
    "n03954731": "刨子",  # plane
    "n04067472": "渔线轮",  # reel
    "n04243546": "老虎机",  # slot
    "n04367480": "拖把",  # swab
    "n12620546": "蔷薇果",  # hip
    "n12768682": "七叶树籽",  # buckeye
}


def test_the_table_is_plain_text_of_three_columns():
    assert not CONTENT.startswith(b"\xef\xbb\xbf") and b"\r" not in CONTENT and CONTENT.endswith(b"\n")
    assert HEADER == ["id", "english", "chinese"]
    assert {len(row) for row in ROWS} == {3}


def test_ids_are_wordnet_ids_in_the_order_of_the_english():
    # The mistake: the Chinese label file's header counted as a class, hence `+ 1`.
    ids = [row[0] for row in ROWS]
    assert len(ids) == len(set(ids)) == 1000
    assert all(re.fullmatch("n[0-9]{8}", name) for name in ids)
    assert ids == sorted(ids)
    landmarks = {0: "tench", 134: "crane bird", 207: "golden retriever", 517: "crane", 999: "toilet tissue"}
    assert {index: ROWS[index][1] for index in landmarks} == landmarks


def test_every_class_has_a_chinese_name():
    assert not [row for row in ROWS if not row[2] or row[2] != row[2].strip()]


def test_chinese_names_are_unique():
    assert len(set(CHINESE.values())) == len(CHINESE) == 1000


def test_chinese_names_have_latin_letters_only_in_acronyms():
    assert {letters for name in CHINESE.values() for letters in re.findall("[A-Za-z]+", name)} == ACRONYMS


def test_chinese_names_are_of_chinese_characters_and_short():
    ours = re.compile("[\u3400-\u4dbf\u4e00-\u9fff（）]+")
    assert not [name for name in CHINESE.values() if not ours.fullmatch(re.sub("|".join(ACRONYMS), "", name) or "一")]
    assert max(map(len, CHINESE.values())) <= 10


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_names_that_are_easily_confounded_are_told_apart(pair):
    (one, its_name), (other, other_name) = pair
    assert (CHINESE[one], CHINESE[other]) == (its_name, other_name)
    assert its_name != other_name and ENGLISH[one] != ENGLISH[other]


@pytest.mark.parametrize("number", MEANINGS)
def test_a_name_is_of_the_meaning_that_the_id_has(number):
    assert CHINESE[number] == MEANINGS[number]


def test_classes_are_named_by_id_or_english_name_also_in_nested_folders():
    classes = ("n01440764", "dogs/n02086240", "tench", "n0", "mine/else", "")
    assert find_names(classes, "en") == {"n01440764": "tench", "dogs/n02086240": "Shih-Tzu", "tench": "tench"}
    assert find_names(classes, "zh")["dogs/n02086240"] == CHINESE["n02086240"]
