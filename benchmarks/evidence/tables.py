def write(result): pass
