"""stub"""
def run(o,s):
    raise NotImplementedError("search")
