"""`gve serve`: an index and its model behind HTTP: a page for people, routes for programs.

Built on aiohttp: one pure asyncio library without a second server beside it, whose multipart parts are read as they
come, so an upload is measured before it is stored. Its own file response is not used: it would also hand out a
`<name>.gz` that lies beside a video.
"""
