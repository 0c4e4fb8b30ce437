/* The fences of ring.pml, each named for what it orders; a mutant lacks one. They bring their own semicolons.
 *
 * F is `futex.fence`: nothing on x86-64, where program order is enough, and a membarrier on aarch64. MB is
 * `futex.fence_all`, a membarrier on both.
 */

#ifdef WEAK
#define F(end) membarrier(end);
#else
#define F(end)
#endif

#ifndef MUT_NO_PAYLOAD_FENCE
#define F_PAYLOAD_BEFORE_TAIL F(W)
#else
#define F_PAYLOAD_BEFORE_TAIL
#endif

#ifndef MUT_NO_EVENT_FENCE
#define F_TAIL_BEFORE_EVENT F(W)
#else
#define F_TAIL_BEFORE_EVENT
#endif

#ifndef MUT_NO_RECLAIM_FENCE
#define F_CURSORS_BEFORE_REUSE F(W)
#else
#define F_CURSORS_BEFORE_REUSE
#endif

#ifndef MUT_NO_LEASE_FENCE
#define F_CURSORS_BEFORE_LEASES F(W)
#else
#define F_CURSORS_BEFORE_LEASES
#endif

#ifndef MUT_NO_WANTED_FENCE
#define MB_WANTED_BEFORE_CURSORS membarrier(W);
#else
#define MB_WANTED_BEFORE_CURSORS
#endif

#ifndef MUT_NO_BELL_FENCE
#define F_CURSOR_BEFORE_BELL F(p)
#else
#define F_CURSOR_BEFORE_BELL
#endif

#ifndef MUT_NO_LAST_FENCE
#define F_TAIL_BEFORE_LOST F(p)
#else
#define F_TAIL_BEFORE_LOST
#endif

#ifndef MUT_NO_FLAG_FENCE
#define F_FLAG_BEFORE_WORD F(W)
#else
#define F_FLAG_BEFORE_WORD
#endif
