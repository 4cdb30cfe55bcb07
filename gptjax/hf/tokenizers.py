"""stub"""


def write_tokenizer(folder, tokenizer, config):
    pass
