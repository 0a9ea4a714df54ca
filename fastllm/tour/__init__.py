"""``fastllm tour``: a language model from raw sources to an aligned chatbot, on this machine, by public commands.

world                    invented people, towns and animals, and what is true of them
phrases, documents       how that is told, asked and answered; prose of it
formats, planted, machine_text, sources    the raw files: WARC, MediaWiki dump, EPUB, text
questions, conversations                   what the model is asked, and the chats and pairs that it is tuned on
sizes, stages            the commands
runner, run              running them in order; what is done is not done again
report, figure           what went in and what came out
"""
